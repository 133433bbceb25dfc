"""InternLM (7B and 20B) as LLaMA: the same names; `bias` is that of the four products of attention."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fireflyds.models.convert.fields import is_computed, llama, refuse, rotary

TEMPLATES = ("internlm",)


def config(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """LLaMA's `config.json`. The `dynamic` base grows for longer documents than the model was trained on, as
    transformers' does with factor 1.

    Raises:
        UserError: another kind of rotary embeddings.
    """
    settings = source.get("rotary") or {}
    kind = settings.get("type", "origin")
    if kind not in ("origin", "dynamic"):
        raise refuse(source, "rotary", "only origin and dynamic are known")
    scaling = {"rope_type": "dynamic", "factor": settings.get("scaling_factor", 1.0)} if kind == "dynamic" else None
    rope = rotary(settings.get("base", 10_000), scaling)
    return llama(source, attention_bias=bool(source.get("bias", True)), **rope)


def convert(source: dict[str, Any], name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The names are LLaMA's."""
    return {} if is_computed(name) else {name: tensor}
