"""What trains: everything, adapters, adapters on a quantised base; embeddings and head beside them."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fireflyds.config import Precision, TuningConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.models.load import DTYPES
from fireflyds.types import Family

ADAPTER = "default"


def quantization(config: TuningConfig, precision: Precision) -> Any:
    """The loading option of QLoRA (NF4, double quantisation; arXiv 2305.14314), None otherwise.

    The head stays as it is: it may train. The storage dtype equals the compute dtype, which ZeRO-3 needs.
    """
    if config.method is not TuningMethod.qlora:
        return None
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[precision],
        bnb_4bit_quant_storage=DTYPES[precision] if torch.cuda.is_available() else torch.uint8,
        llm_int8_skip_modules=["lm_head"],
    )


def apply(model: nn.Module, family: Family, config: TuningConfig, seed: int) -> nn.Module:
    """Mark what trains and put adapters in place. The model keeps its class and the names of its parameters.

    Trained tensors beside adapters are float32: half-precision ones cannot be unscaled under fp16.
    """
    if config.method is TuningMethod.full:
        return model
    from peft import LoraConfig, inject_adapter_in_model

    torch.manual_seed(seed)
    model.requires_grad_(False)
    lora = LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=list(config.target_modules or family.linear_layers),
    )
    inject_adapter_in_model(lora, model, ADAPTER)
    if config.train_embeddings:
        for module in (model.get_input_embeddings(), model.get_output_embeddings()):  # type: ignore[operator]
            module.float().requires_grad_(True)
    return model


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters and those that train; a 4-bit weight counts what it stands for."""
    total = trainable = 0
    for parameter in model.parameters():
        state = getattr(parameter, "quant_state", None)
        number = state.shape.numel() if state is not None else parameter.numel()
        total += number
        trainable += number if parameter.requires_grad else 0
    return total, trainable


def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The weights of the plain model that computes what this one does: adapters merged, 4-bit weights unpacked.

    Merging happens in float32: a merge into 4 bit would lose what was learnt.
    """
    from peft.tuners.lora import LoraLayer

    merged = {name: tensor for name, tensor in model.state_dict().items() if _is_plain(name)}
    for name, module in model.named_modules():
        if isinstance(module, LoraLayer):
            base = module.get_base_layer()
            a, b = module.lora_A[ADAPTER].weight.float(), module.lora_B[ADAPTER].weight.float()
            merged[f"{name}.weight"] = _float_weight(base) + module.scaling[ADAPTER] * (b @ a)
            if getattr(base, "bias", None) is not None:
                merged[f"{name}.bias"] = base.bias
        elif getattr(getattr(module, "weight", None), "quant_state", None) is not None and _is_plain(f"{name}.weight"):
            merged[f"{name}.weight"] = _float_weight(module)
    return {name: tensor.detach().cpu() for name, tensor in merged.items()}


def _is_plain(name: str) -> bool:
    """Not a part of an adapted layer, nor of a 4-bit weight's description."""
    return not any(
        part in name for part in (".base_layer.", ".lora_", ".weight.absmax", ".weight.quant", ".weight.nested")
    )


def _float_weight(layer: Any) -> Tensor:
    if getattr(layer.weight, "quant_state", None) is None:
        return layer.weight.float()
    import bitsandbytes.functional

    return bitsandbytes.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()


def restore(model: nn.Module, weights: dict[str, Tensor], source: Path) -> None:
    """Put trained weights into a model whose trainable parameters are marked.

    Raises:
        UserError: a trained parameter is missing from the weights, or its shape is another.
    """
    parameters = dict(model.named_parameters())
    missing = [name for name, parameter in parameters.items() if parameter.requires_grad and name not in weights]
    if missing:
        raise UserError(
            f"{source}: lacks {len(missing)} trained tensors, {missing[0]} among them. The checkpoint is not of this run"
        )
    with torch.no_grad():
        for name, tensor in weights.items():
            if name not in parameters:
                continue
            if parameters[name].shape != tensor.shape:
                raise UserError(
                    f"{source}: {name} is {[*tensor.shape]}, the model has {[*parameters[name].shape]}. Its base changed since"
                )
            parameters[name].copy_(tensor)
