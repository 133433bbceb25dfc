"""Fields of `config.json` that makers and transformers name alike, and tensors that are no weights."""

from typing import Any

from torch import Tensor

from fireflyds.errors import UserError

_COMMON = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "tie_word_embeddings",
    "bos_token_id", "eos_token_id", "pad_token_id", "torch_dtype", "dtype", "base_vocab_size", "base_vocab_sizes",
)  # fmt: skip
# Frequencies of rotary embeddings are computed from the configuration.
_COMPUTED = ("rotary_emb.inv_freq", "rotary_pos_emb.inv_freq", "rope.freqs")


def common(source: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The fields of `source` that keep their names, and `changes`; a change to None leaves a field out."""
    fields = {name: source[name] for name in _COMMON if source.get(name) is not None} | changes
    return {name: value for name, value in fields.items() if value is not None}


def llama(source: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """The `config.json` of a LLaMA with the numbers of `source`, and `changes`."""
    defaults = {"tie_word_embeddings": False, "hidden_act": "silu"}
    named = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
    return defaults | common(source, **changes) | named


def rotary(base: float, scaling: dict[str, Any] | None = None) -> dict[str, Any]:
    """`rope_parameters` for a base, and for the settings that transformers 4 called `rope_scaling`."""
    scaling = dict(scaling or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    return {"rope_parameters": scaling | {"rope_type": kind, "rope_theta": float(base)}}


def renamed(name: str, names: dict[str, str]) -> str:
    """The name with every part that stands in `names` replaced."""
    for theirs, ours in names.items():
        name = name.replace(theirs, ours)
    return name


def is_computed(name: str) -> bool:
    """True for a tensor of rotary frequencies, which files of older models carry."""
    return name.endswith(_COMPUTED)


def refuse(source: dict[str, Any], key: str, why: str) -> UserError:
    """The error of a field of `config.json` that the target architecture cannot express."""
    return UserError(
        f"its config.json has {key}={source.get(key)!r}: {why}",
        key="model",
        remedy="Give a checkpoint without it, or one that its maker converted",
    )


def split(tensor: Tensor, sizes: dict[str, int], suffix: str = "") -> dict[str, Tensor]:
    """Blocks of rows by name; `sizes`: the number of rows of each, in order."""
    return {f"{name}{suffix}": part for name, part in zip(sizes, tensor.split([*sizes.values()]), strict=True)}
