"""Checks that packing is exact: loss and gradients equal those of single documents, and documents do not interact."""

import os
from typing import Any

import torch
from fireflyds_kernels import dispatch

from fireflyds.config import DoctorConfig, HardwareConfig, Precision
from fireflyds.doctor.check import Check, failed, passed
from fireflyds.doctor.input_files import error_from
from fireflyds.errors import UserError
from fireflyds.models.load import config_of, exact_attention
from fireflyds.models.packed.equivalence import compare_implementations, table
from fireflyds.models.precision import DTYPES, resolve_precision
from fireflyds.models.rope_scaling import check_max_positions


def validate_config(config: DoctorConfig) -> None:
    """Validates the configuration before a model is loaded.

    Raises:
        UserError: no model at that path, no such device or number format, or documents longer than its positions.
        CannotRunError: a kernel that is forced does not exist.
    """
    with dispatch.force(os.environ.get(dispatch.VARIABLE)):
        pass
    resolve_precision(HardwareConfig(precision=config.precision), "precision")
    _device(config.device)
    check_max_positions(_settings(config), "documents: the longest", max(config.documents))


def check_packing(config: DoctorConfig) -> tuple[Check, str]:
    """Returns the check and the table of all comparisons. An error during the comparison becomes a failed check."""
    try:
        return _check_packing(config)
    except UserError as error:
        return error_from("packing", error), ""
    except (torch.OutOfMemoryError, MemoryError):
        remedy = "give layers=<fewer>, shorter documents=, precision=bf16 or fp16, or device=cpu"
        return failed("packing", f"not proven: no memory left for {config.model} and its gradients", remedy), ""
    except Exception as error:
        message = f"not proven: {type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        remedy = f"see `weights` and `base` for what is wrong in {config.model}; try device=cpu and precision=fp32"
        return failed("packing", message, remedy), ""


def _check_packing(config: DoctorConfig) -> tuple[Check, str]:
    precision = resolve_precision(HardwareConfig(precision=config.precision), "precision")
    model = load_model(config, precision)
    summary = f"{type(model).__name__} of {config.model}, {precision.name}, documents of {config.documents} tokens"
    findings = list(compare_implementations(model, list(config.documents), config.seed))
    comparison = f"{summary}\n{table(findings)}"
    if not findings:
        remedy = "check FIREFLYDS_KERNELS, and the kernels above for the GPU and number format that each requires"
        return failed("packing", "not proven: no packed attention runs this model here", remedy), comparison
    if wrong := [finding.implementation for finding in findings if not finding.proven]:
        remedy = (
            "do not train with it: FIREFLYDS_KERNELS=packed_attention=<another>, and report the table with "
            f"{config.model}"
        )
        return failed("packing", f"differs from separate documents with {', '.join(wrong)}", remedy), comparison
    return passed("packing", f"proven for {', '.join(finding.implementation for finding in findings)}"), comparison


def load_model(config: DoctorConfig, precision: Precision) -> Any:
    """Loads the model with transformers, in evaluation mode (no dropout).

    Raises:
        UserError: no model at that path, or no such device.
    """
    from fireflyds.models.text_model import trained_class

    settings, device = _settings(config), _device(config.device)
    model = trained_class(settings).from_pretrained(
        config.model, config=settings, dtype=DTYPES[precision], **exact_attention(settings)
    )
    return model.to(device).eval()


def _settings(config: DoctorConfig) -> Any:
    settings = config_of("model", config.model)
    if config.layers is not None:
        text = settings.get_text_config()
        text.num_hidden_layers = min(config.layers, text.num_hidden_layers)
        if getattr(text, "layer_types", None):
            text.layer_types = text.layer_types[: text.num_hidden_layers]
    return settings


def _device(name: str) -> torch.device:
    gpus = torch.cuda.device_count()
    known = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name and name not in known:
        raise UserError("not on this machine", key="device", value=name, remedy=f"Known: {', '.join(known)}")
    return torch.device(name or ("cuda" if gpus else "cpu"))
