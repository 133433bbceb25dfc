"""Loading of models: configuration and weights from a directory, or random weights for an architecture."""

import os
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from fireflyds import registry
from fireflyds.config import ModelConfig, ModelInit, Precision
from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.models.deferred import deferred_model
from fireflyds.models.derived_family import FAMILIES, derive_family
from fireflyds.models.precision import DTYPES, inference_dtype
from fireflyds.models.rope_scaling import apply_rope_scaling
from fireflyds.models.text_model import build, is_wrapper, plain_class, tie_as_stored, trained_class
from fireflyds.tokenizer.rows import MAX_PADDING
from fireflyds.types import Encoder, Family, Loaded

_DISABLE_ASYNC_LOAD = "HF_DEACTIVATE_ASYNC_LOAD"


def read_config(config: ModelConfig, encoder: Encoder, key: str = "model.path") -> Any:
    """Returns the Hugging Face configuration of the model to train, checked against its tokenizer.

    Args:
        key: the verb's key of the model directory, for errors.

    Raises:
        UserError: no model in the directory, an unknown architecture, or embeddings that do not match the size of the
            tokenizer.
    """
    if config.init is ModelInit.scratch:
        defaults = {"vocab_size": encoder.vocab_size, "bos_token_id": encoder.bos_id, "eos_token_id": encoder.eos_id}
        settings = defaults | config.architecture
        return apply_rope_scaling(_of_architecture(settings), config)
    folder, hf_config = Path(config.path), _read_directory_config(config, key)
    rows = hf_config.get_text_config().vocab_size
    if not 0 <= rows - encoder.vocab_size < MAX_PADDING:
        raise UserError(
            f"the embeddings have {rows} rows but the tokenizer {config.tokenizer_path} has "
            f"{encoder.vocab_size} tokens; rows may exceed tokens by padding only",
            key=key,
            value=folder,
            remedy="Set the tokenizer of this model, or expand the model for a larger tokenizer with launch/expand.py",
        )
    return apply_rope_scaling(hf_config, config)


def config_of(key: str, path: str) -> Any:
    """Returns the Hugging Face configuration of the directory `path`, the value of the field `key`.

    Remote code (`trust_remote_code`) is never run.

    Raises:
        UserError: no config.json, or an architecture that transformers does not support as a causal language model.
    """
    if not (Path(path) / "config.json").is_file():
        raise _no_model(key, path)
    try:
        hf_config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise UserError(
            str(error).splitlines()[0].rstrip("."),
            key=key,
            value=path,
            remedy=(
                "Remote code is not run (trust_remote_code): convert it with launch/convert.py, or give a model that "
                "this version of transformers supports"
            ),
        ) from error
    if plain_class(hf_config) is None:
        raise UserError(
            f"is a {hf_config.model_type}, which transformers does not build as a causal language model",
            key=key,
            value=path,
            remedy="Give a causal language model",
        )
    tie_as_stored(hf_config, Path(path))
    return hf_config


def _of_architecture(settings: dict[str, Any]) -> Any:
    """The configuration of `model.architecture`.

    Raises:
        UserError: a model that wraps a text model; its other parts are read from files alone.
    """
    hf_config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    if is_wrapper(hf_config):
        raise UserError(
            f"{hf_config.model_type} holds a text model beside towers for images or sound, which have no files here",
            key="model.architecture.model_type",
            value=hf_config.model_type,
            remedy=f"Give model=<path>, or the text model alone ({hf_config.get_text_config().model_type})",
        )
    return hf_config


def _no_model(key: str, path: str) -> UserError:
    """The error of a path without `config.json`, by what is there instead."""
    folder = Path(path)
    message, remedy = "no config.json there", "Give the directory of a Hugging Face model"
    if (folder / "adapter_config.json").is_file():
        base = read_json(folder / "adapter_config.json").get("base_model_name_or_path")
        message = f"{message}: it holds adapters of {base}, not a model"
        remedy = "Merge them into their base and give the result, or give the base"
    elif path and (folder.suffix == ".gguf" or any(folder.glob("*.gguf"))):
        message = f"{message}: it holds GGUF, whose weights are quantised for inference"
        remedy = "Give the Hugging Face directory that it was made from"
    return UserError(message, key=key, value=path, remedy=remedy)


def _refuse_quantised(hf_config: Any, key: str, path: str) -> None:
    """Raises `UserError` for a model whose files are quantised: neither they nor adapters on them are trained."""
    settings = getattr(hf_config, "quantization_config", None)
    if settings is None:
        return
    method = settings.get("quant_method") if isinstance(settings, dict) else settings.quant_method
    method = getattr(method, "value", method)
    raise UserError(
        f"its weights are quantised ({method}), and training starts from weights in 16 or 32 bits",
        key=key,
        value=path,
        remedy=(
            "Give the model that it was quantised from, or this one from launch/convert.py, which de-quantises it; "
            "tuning=qlora quantises while loading"
        ),
    )


def _read_directory_config(config: ModelConfig, key: str = "model.path") -> Any:
    """Reads the configuration of the model directory `key` and checks it against `model.architecture`."""
    folder, hf_config = Path(config.path), config_of(key, config.path)
    _refuse_quantised(hf_config, key, config.path)
    for name, value in config.architecture.items():
        if getattr(hf_config, name, None) != value:
            raise UserError(
                f"has {name}={getattr(hf_config, name, None)}, model.architecture has {value}",
                key=key,
                value=folder,
                remedy="Give the directory of that model, or model=<path> for this one",
            )
    return hf_config


def architecture_of(config: ModelConfig) -> Any:
    """Returns the Hugging Face configuration of `model.path`, or without a path that of `model.architecture`.

    Raises:
        UserError: neither is set, or the two differ.
    """
    if config.path:
        return apply_rope_scaling(_read_directory_config(config), config)
    settings = dict(config.architecture)
    if "model_type" not in settings:
        raise UserError(
            "neither model.path nor model.architecture is set",
            key="model",
            remedy="Give model=<path>, or an option of conf/model",
        )
    return apply_rope_scaling(_of_architecture(settings), config)


def base_vocab_size(config: ModelConfig, hf_config: Any) -> int | None:
    """Returns the number of rows before the vocabulary expansion; None where neither configuration nor model has it.

    A model that was expanded more than once records the rows before each expansion; any of them can be configured.

    Raises:
        UserError: configuration and model have different numbers.
    """
    hf_config = hf_config.get_text_config()
    recorded: int | None = getattr(hf_config, "base_vocab_size", None)
    configured = config.base_vocab_size
    known = getattr(hf_config, "base_vocab_sizes", None) or [recorded]
    if recorded is not None and configured is not None and configured not in known:
        raise UserError(
            f"the model's config.json has {', '.join(map(str, known))}",
            key="model.base_vocab_size",
            value=configured,
            remedy="Remove the setting, or give the model that it belongs to",
        )
    return recorded if configured is None else configured


def bare_model(hf_config: Any) -> Any:
    """Returns the model to train without weights, on the meta device."""
    with torch.device("meta"):
        return build(hf_config)


def family_of(hf_config: Any) -> Family:
    """Returns the family of a Hugging Face configuration: the one written for its model type, or one derived from the
    modules of its model."""
    if hf_config.model_type not in registry.names(FAMILIES):
        return derive_family(bare_model(hf_config))
    family: Family = registry.load(FAMILIES, hf_config.model_type).FAMILY
    return family


def load_model(
    config: ModelConfig,
    hf_config: Any,
    precision: Precision,
    seed: int,
    quantization: Any = None,
    *,
    deferred: bool = False,
) -> Loaded:
    """Loads the model in the dtype of `precision`, quantised while loading where `quantization` is not None.

    With `model.init` scratch the weights are random, drawn with `seed`. `deferred`: weights of a directory are read
    later, one by one, where its files allow it (see `models/deferred.py`).
    """
    family = family_of(hf_config)
    dtype = DTYPES[precision]
    model = None
    if config.init is ModelInit.scratch:
        torch.manual_seed(seed)
        model = build(hf_config, dtype=dtype)
    elif deferred:
        model = deferred_model(config.path, hf_config, dtype, quantization)
        if model is None:
            warnings.warn(
                f"model.path={config.path}: its files must be converted by transformers, so every rank reads the whole "
                "model before zero.stage=3 shards it",
                stacklevel=2,
            )
    if model is None:
        load = partial(trained_class(hf_config).from_pretrained, config.path, config=hf_config, dtype=dtype)
        model = load() if quantization is None else _load_quantised(load, quantization)
    return Loaded(model, family)


def load_for_inference(folder: Path | str, *, or_on_cpu: bool = False) -> Any:
    """Loads a Hugging Face directory with plain transformers, in evaluation mode, on the first GPU if there is one.

    `or_on_cpu`: a model that this GPU has no memory for is loaded on the CPU.

    Raises:
        UserError: the weights need more memory than that GPU has free.
    """
    hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    options = {"config": hf_config, "dtype": inference_dtype(hf_config)} | exact_attention(hf_config)
    load = partial(plain_class(hf_config).from_pretrained, folder, **options)
    if not torch.cuda.is_available():
        return load().eval()
    needed, (free, _) = _inference_bytes(Path(folder), hf_config), torch.cuda.mem_get_info(0)
    if needed <= free:
        return load(device_map={"": 0}).eval()  # each tensor is read onto the GPU, without a copy on the host
    if or_on_cpu:
        return load().eval()
    raise UserError(
        f"its weights take {needed / 2**30:.1f} GiB and the first GPU has {free / 2**30:.1f} GiB free; "
        "evaluation and chat use one GPU",
        key="model",
        value=folder,
        remedy="Free the GPU, or use one with more memory",
    )


def exact_attention(hf_config: Any) -> dict[str, str]:
    """Options of loading under which transformers' own attention is exact: its `sdpa` leaves out soft caps."""
    return (
        {"attn_implementation": "eager"} if getattr(hf_config.get_text_config(), "attn_logit_softcapping", None) else {}
    )


def _inference_bytes(folder: Path, hf_config: Any) -> int:
    """Bytes of the weights in memory: those of the files where they are quantised, else parameters times their size."""
    if getattr(hf_config, "quantization_config", None):
        return sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    dtype = inference_dtype(hf_config)
    own: torch.dtype = (getattr(hf_config, "dtype", None) or torch.float32) if isinstance(dtype, str) else dtype
    return sum(parameter.numel() for parameter in bare_model(hf_config).parameters()) * own.itemsize


def _load_quantised(load: Callable[..., Any], quantization: Any) -> Any:
    """Quantises tensor by tensor on the device, so that the 16-bit model is never whole in memory.

    Asynchronous loading of transformers is disabled: its threads read ahead of the quantisation, at worst the whole
    model onto the device.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    previous = os.environ.get(_DISABLE_ASYNC_LOAD)
    os.environ[_DISABLE_ASYNC_LOAD] = "1"
    try:
        return load(quantization_config=quantization, device_map={"": device})
    finally:
        del os.environ[_DISABLE_ASYNC_LOAD]
        if previous is not None:
            os.environ[_DISABLE_ASYNC_LOAD] = previous
