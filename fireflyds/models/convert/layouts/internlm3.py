"""InternLM3 as LLaMA: the same names; biases of queries, keys and values are set apart from those of the rest."""

from pathlib import Path
from typing import Any

from torch import Tensor

from fireflyds.models.convert.fields import is_computed, llama, refuse, rotary

TEMPLATES = ("internlm2",)


def config(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """LLaMA's `config.json`.

    Raises:
        UserError: biases of attention that LLaMA cannot have.
    """
    bias, qkv_bias = bool(source.get("bias")), bool(source.get("qkv_bias"))
    if bias != qkv_bias:
        raise refuse(source, "qkv_bias", f"LLaMA has biases in all products of attention or none, and bias={bias}")
    rope = rotary(source.get("rope_theta", 10_000), source.get("rope_scaling"))
    return llama(source, attention_bias=bias, mlp_bias=bias, **rope)


def convert(source: dict[str, Any], name: str, tensor: Tensor) -> dict[str, Tensor]:
    """The names are LLaMA's."""
    return {} if is_computed(name) else {name: tensor}
