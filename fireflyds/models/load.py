"""Weights from a directory, or drawn at random for an architecture."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fireflyds import registry
from fireflyds.config import ModelConfig, ModelInit, Precision
from fireflyds.errors import UserError
from fireflyds.types import Encoder, Family, Loaded

DTYPES = {Precision.fp32: torch.float32, Precision.bf16: torch.bfloat16, Precision.fp16: torch.float16}


# Published models pad their embeddings by a few hundred rows at most (Qwen2: 271).
MAX_PADDING = 1024


def read_config(config: ModelConfig, encoder: Encoder) -> Any:
    """The Hugging Face configuration of the model to train, checked against its tokenizer.

    Raises:
        UserError: no model there, an unknown family, or embeddings of another size than the tokenizer.
    """
    if config.init is ModelInit.scratch:
        known = {"vocab_size": encoder.vocab_size, "bos_token_id": encoder.bos_id, "eos_token_id": encoder.eos_id}
        settings = known | config.architecture
        return AutoConfig.for_model(settings.pop("model_type"), **settings)
    folder = Path(config.path)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path={folder}: no config.json there. Give the directory of a Hugging Face model")
    loaded = AutoConfig.from_pretrained(folder)
    if not 0 <= loaded.vocab_size - encoder.vocab_size < MAX_PADDING:
        raise UserError(
            f"model.path={folder}: the embeddings have {loaded.vocab_size} rows but the tokenizer "
            f"{config.tokenizer_path} has {encoder.vocab_size} pieces; rows may exceed pieces by padding only. Name the "
            "tokenizer that belongs to the model, or give the model rows for a larger one with launch/expand.py"
        )
    return loaded


def check_positions(hf_config: Any, key: str, length: int) -> None:
    """Raises `UserError` when the documents that `key` asks for are longer than the model has positions."""
    most = getattr(hf_config, "max_position_embeddings", None)
    # Dynamic NTK scaling stretches the positions to each document's length.
    dynamic = (getattr(hf_config, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
    if most is not None and length > most and not dynamic:
        raise UserError(f"{key}={length}: the model has {most} positions. Use {most} or less")


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
        options = {} if quantization is None else {"quantization_config": quantization}
        model = AutoModelForCausalLM.from_pretrained(config.path, dtype=dtype, **options)
    return Loaded(model, family)
