"""Longer contexts: rotary positions scaled in the model's configuration, where transformers, export and our kernels read them."""

import math
from typing import Any

from fireflyds.config import ModelConfig
from fireflyds.errors import UserError

# What each kind wants besides `rope_type`, and what it may be given. `ntk` and `ntk_auto` become a `rope_theta`.
_NEEDS: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "ntk": {"alpha"},
    "ntk_auto": {"seq_len"},
}
_MAY: dict[str, set[str]] = {
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "ntk_auto": {"coefficient", "half_context"},
}


def ntk_base(base: float, alpha: float, head_dim: int) -> float:
    """The rotary base under NTK-aware scaling: base · α^(d / (d − 2))."""
    return float(base * alpha ** (head_dim / (head_dim - 2)))


def ntk_alpha(seq_len: int, half_context: float, coefficient: float = 1.0) -> float:
    """Chinese-LLaMA-Alpaca's α for a length: (L / half − 1) · coefficient, with half of what the model was trained on.

    Its second generation takes max_position_embeddings / 2 and 1.0, its first 1024 and 1.1.
    """
    return (seq_len / half_context - 1) * coefficient


def apply_rope_scaling(hf_config: Any, config: ModelConfig) -> Any:
    """The configuration with `model.rope_scaling` in it; `max_position_embeddings` grows with the factor.

    Raises:
        UserError: an unknown kind, a setting that is missing or not its own, a model without rotary embeddings, or one
            that was stretched already.
    """
    asked = dict(config.rope_scaling)
    if not asked:
        return hf_config
    kind = asked.pop("rope_type", None)
    if kind not in _NEEDS:
        raise UserError(f"model.rope_scaling.rope_type={kind}: no such kind. Known: {', '.join(_NEEDS)}")
    before = getattr(hf_config, "rope_parameters", None)
    if not before or "rope_theta" not in before:
        raise UserError(
            f"model.rope_scaling: {hf_config.model_type} has no rotary embeddings of one kind. Leave it out"
        )
    if before.get("rope_type", "default") != "default":
        raise UserError(
            f"model.rope_scaling: the model's positions are scaled already ({before['rope_type']}). Leave it out, or give the unscaled model"
        )
    missing, unknown = _NEEDS[kind] - asked.keys(), asked.keys() - _NEEDS[kind] - _MAY.get(kind, set())
    if missing or unknown:
        wrong = f"{min(missing)} is missing" if missing else f"{min(unknown)} is not one of its settings"
        raise UserError(
            f"model.rope_scaling: {wrong}. {kind} takes {', '.join(sorted(_NEEDS[kind] | _MAY.get(kind, set()))) or 'nothing'}"
        )
    for name, value in asked.items():
        _check_value(name, value)
    _scale(hf_config, kind, asked, before)
    return hf_config


def _check_value(name: str, value: Any) -> None:
    """Raises `UserError` for a setting that is no number, or too small to stretch anything."""
    if name == "truncate":
        if not isinstance(value, bool):
            raise UserError(f"model.rope_scaling.truncate={value!r}: must be true or false")
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if name in ("factor", "alpha", "seq_len"):
        if not is_number or value < 1:
            raise UserError(f"model.rope_scaling.{name}={value!r}: must be a number of at least 1, such as {name}: 4")
    elif not is_number or value <= 0:
        raise UserError(f"model.rope_scaling.{name}={value!r}: must be a number above 0")


def _scale(hf_config: Any, kind: str, asked: dict[str, Any], before: dict[str, Any]) -> None:
    most = hf_config.max_position_embeddings
    theta, dim = (
        before["rope_theta"],
        getattr(hf_config, "head_dim", None) or (hf_config.hidden_size // hf_config.num_attention_heads),
    )
    if kind in ("ntk", "ntk_auto"):
        alpha = asked.get("alpha") or ntk_alpha(
            asked["seq_len"], asked.get("half_context", most / 2), asked.get("coefficient", 1.0)
        )
        if alpha < 1:
            raise UserError(
                f"model.rope_scaling: alpha={alpha:g} would shrink the context. Ask for more than {most} positions"
            )
        hf_config.rope_parameters = before | {"rope_theta": ntk_base(theta, alpha, dim)}
        hf_config.max_position_embeddings = max(most, asked.get("seq_len", round(most * alpha)))
        return
    added = {"original_max_position_embeddings": most} if kind in ("yarn", "llama3") else {}
    hf_config.rope_parameters = before | asked | added | {"rope_type": kind}
    if kind in ("linear", "yarn", "llama3"):
        # Dynamic scaling goes by each document's length against what the model was trained on, so there it stays.
        hf_config.max_position_embeddings = round(most * asked["factor"])


def check_max_positions(hf_config: Any, key: str, length: int) -> None:
    """Raises `UserError` when the documents that `key` asks for are longer than the model has positions."""
    most = getattr(hf_config, "max_position_embeddings", None)
    # Dynamic NTK scaling stretches the positions to each document's length.
    dynamic = (getattr(hf_config, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
    if most is not None and length > most and not dynamic:
        raise UserError(
            f"{key}={length}: the model has {most} positions. Use {most} or less, or stretch them with model.rope_scaling"
        )
