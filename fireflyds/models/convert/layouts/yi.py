"""The first files of Yi as LLaMA: the two norms of a block have other names (arXiv 2403.04652)."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fireflyds.models.convert.fields import is_computed, llama, renamed, rotary

_NORMS = {".ln1.": ".input_layernorm.", ".ln2.": ".post_attention_layernorm."}
TEMPLATES = ("chatml",)


def config(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """LLaMA's `config.json`."""
    return llama(source, **rotary(source.get("rope_theta", 5_000_000), source.get("rope_scaling")))


def convert(source: dict[str, Any], name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Renames the norms."""
    if is_computed(name):
        return {}
    name = renamed(name, _NORMS)
    return {name: tensor}
