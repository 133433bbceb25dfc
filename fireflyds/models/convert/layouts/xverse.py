"""XVERSE as LLaMA: the same names and numbers under another `model_type`."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fireflyds.models.convert.fields import is_computed, llama, rotary

TEMPLATES = ("xverse",)


def config(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """LLaMA's `config.json`."""
    return llama(source, **rotary(source.get("rope_theta", 10_000), source.get("rope_scaling")))


def convert(source: dict[str, Any], name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The names are LLaMA's."""
    return {} if is_computed(name) else {name: tensor}
