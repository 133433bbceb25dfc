"""Baichuan-7B and Baichuan2-7B as LLaMA (arXiv 2309.10305); those with ALiBi (13B) have no architecture there."""

from pathlib import Path
from typing import Any

from torch import Tensor
from torch.nn.functional import normalize

from fireflyds.errors import UserError
from fireflyds.models.baichuan import BaichuanConfig
from fireflyds.models.convert.fields import is_computed, llama, split

_PACKED = ".W_pack.weight"
TEMPLATES = ("baichuan", "baichuan2")


def config(source: dict[str, Any], folder: Path) -> dict[str, Any]:
    """LLaMA's `config.json`.

    Raises:
        UserError: a model with ALiBi.
    """
    if BaichuanConfig(**source).alibi:
        raise UserError(
            "it has ALiBi, and transformers has no architecture with ALiBi and its gated MLP",
            key="model",
            value=source["model_type"],
            remedy="Give it to train, evaluate and export as it is: they know Baichuan's own layout",
        )
    return llama(source)


def convert(source: dict[str, Any], name: str, tensor: Tensor) -> dict[str, Tensor]:
    """Splits `W_pack`, and divides the rows of Baichuan 2's head by their norms, once."""
    if is_computed(name):
        return {}
    if name.endswith(_PACKED):
        prefix = name.removesuffix(_PACKED)
        rows = source["hidden_size"]
        return split(tensor, {f"{prefix}.{part}_proj": rows for part in "qkv"}, ".weight")
    if name == "lm_head.weight" and BaichuanConfig(**source).has_normalized_head():
        return {name: normalize(tensor.float()).to(tensor.dtype)}
    return {name: tensor}
