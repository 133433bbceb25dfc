"""Weights from a directory, or drawn at random for an architecture."""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fireflyds import registry
from fireflyds.config import ModelConfig, ModelInit, Precision
from fireflyds.errors import UserError
from fireflyds.models.precision import DTYPES, inference_dtype
from fireflyds.models.rope_scaling import apply_rope_scaling
from fireflyds.types import Encoder, Family, Loaded

# Published models pad their embeddings by a few hundred rows at most (Qwen2: 271).
MAX_PADDING = 1024
_NO_THREADS = "HF_DEACTIVATE_ASYNC_LOAD"


def read_config(config: ModelConfig, encoder: Encoder) -> Any:
    """The Hugging Face configuration of the model to train, checked against its tokenizer.

    Raises:
        UserError: no model there, an unknown family, or embeddings of another size than the tokenizer.
    """
    if config.init is ModelInit.scratch:
        known = {"vocab_size": encoder.vocab_size, "bos_token_id": encoder.bos_id, "eos_token_id": encoder.eos_id}
        settings = known | config.architecture
        return apply_rope_scaling(AutoConfig.for_model(settings.pop("model_type"), **settings), config)
    folder, loaded = Path(config.path), _from_directory(config)
    if not 0 <= loaded.vocab_size - encoder.vocab_size < MAX_PADDING:
        raise UserError(
            f"model.path={folder}: the embeddings have {loaded.vocab_size} rows but the tokenizer "
            f"{config.tokenizer_path} has {encoder.vocab_size} pieces; rows may exceed pieces by padding only. Name the "
            "tokenizer that belongs to the model, or give the model rows for a larger one with launch/expand.py"
        )
    return apply_rope_scaling(loaded, config)


def config_of(key: str, path: str) -> Any:
    """The Hugging Face configuration of a model's directory, which the field `key` names. Code beside it is never run.

    Raises:
        UserError: there is none, or transformers does not know such models.
    """
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"{key}={path}: no config.json there. Give the directory of a Hugging Face model")
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise UserError(
            f"{key}={path}: {str(error).splitlines()[0]}. Code that comes with a model is not run: give a model that this "
            "version of transformers knows"
        ) from error


def _from_directory(config: ModelConfig) -> Any:
    folder, loaded = Path(config.path), config_of("model.path", config.path)
    for key, value in config.architecture.items():
        if getattr(loaded, key, None) != value:
            raise UserError(
                f"model.path={folder}: has {key}={getattr(loaded, key, None)}, model.architecture says {value}. Give the "
                "directory of that model, or model=<path> for this one"
            )
    return loaded


def architecture_of(config: ModelConfig) -> Any:
    """The Hugging Face configuration from the directory, or where none is given from `architecture` alone.

    Raises:
        UserError: neither is there, or the two disagree.
    """
    if config.path:
        return apply_rope_scaling(_from_directory(config), config)
    settings = dict(config.architecture)
    if "model_type" not in settings:
        raise UserError(
            "model: neither model.path nor model.architecture is given. Give model=<path>, or an option of conf/model"
        )
    return apply_rope_scaling(AutoConfig.for_model(settings.pop("model_type"), **settings), config)


def base_vocab_size(config: ModelConfig, hf_config: Any) -> int | None:
    """Rows of the vocabulary before its expansion, where anybody said.

    Raises:
        UserError: configuration and model say different numbers.
    """
    recorded: int | None = getattr(hf_config, "base_vocab_size", None)
    asked = config.base_vocab_size
    if recorded is not None and asked is not None and recorded != asked:
        raise UserError(
            f"model.base_vocab_size={asked}: the model's config.json says {recorded}. Leave it out, or name the model it is of"
        )
    return recorded if asked is None else asked


def bare_model(hf_config: Any) -> Any:
    """The model without weights, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(hf_config)


def family_of(model_type: str) -> Family:
    """The family of a Hugging Face `model_type`."""
    family: Family = registry.find("fireflyds.models.families", model_type).FAMILY
    return family


def load_model(
    config: ModelConfig, hf_config: Any, precision: Precision, seed: int, quantization: Any = None
) -> Loaded:
    """The model, in the dtype of `precision`, quantised on the way in when `quantization` says so."""
    family = family_of(hf_config.model_type)
    dtype = DTYPES[precision]
    if config.init is ModelInit.scratch:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype)
    else:
        load = partial(AutoModelForCausalLM.from_pretrained, config.path, config=hf_config, dtype=dtype)
        model = load() if quantization is None else _quantised(load, quantization)
    return Loaded(model, family)


def load_for_inference(folder: Path | str) -> Any:
    """A Hugging Face directory as plain transformers loads it, in evaluation mode, on the first GPU where there is one."""
    hf_config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(folder, config=hf_config, dtype=inference_dtype(hf_config)).eval()
    return model.cuda() if torch.cuda.is_available() else model


def _quantised(load: Callable[..., Any], quantization: Any) -> Any:
    """Quantised tensor by tensor on the device itself: the whole model is nowhere in 16 bit.

    Threads of transformers would read ahead of the quantisation, at worst the whole model onto the device.
    """
    device = torch.cuda.current_device() if torch.cuda.is_available() else "cpu"
    before = os.environ.get(_NO_THREADS)
    os.environ[_NO_THREADS] = "1"
    try:
        return load(quantization_config=quantization, device_map={"": device})
    finally:
        del os.environ[_NO_THREADS]
        if before is not None:
            os.environ[_NO_THREADS] = before
