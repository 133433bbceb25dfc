"""RoPE scaling for longer contexts.

The settings are written into the model's Hugging Face configuration (`rope_parameters`), which transformers, the export
and the kernels read.
"""

import math
from typing import Any

from fireflyds.config import ModelConfig
from fireflyds.errors import UserError
from fireflyds.models.architecture import head_dim

# Required and optional settings of each `rope_type`. `ntk` and `ntk_auto` are converted to a larger `rope_theta`.
_REQUIRED: dict[str, set[str]] = {
    "default": set(),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "yarn": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "ntk": {"alpha"},
    "ntk_auto": {"seq_len"},
}
_OPTIONAL: dict[str, set[str]] = {
    "yarn": {"attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"},
    "ntk_auto": {"coefficient", "half_context"},
}


def ntk_base(base: float, alpha: float, head_dim: int) -> float:
    """The rotary base under NTK-aware scaling: base · α^(d / (d − 2))."""
    return float(base * alpha ** (head_dim / (head_dim - 2)))


def ntk_alpha(seq_len: int, half_context: float, coefficient: float = 1.0) -> float:
    """α of Chinese-LLaMA-Alpaca for a context of `seq_len` tokens: (seq_len / half_context − 1) · coefficient.

    `half_context`: half of the pretraining context in tokens. Chinese-LLaMA-Alpaca-2 uses max_position_embeddings / 2
    with coefficient 1.0, the first version 1024 with 1.1.
    """
    return (seq_len / half_context - 1) * coefficient


def apply_rope_scaling(hf_config: Any, config: ModelConfig) -> Any:
    """Writes `model.rope_scaling` into the text model's part of `hf_config`, in place, and returns `hf_config`.

    `max_position_embeddings` grows with the scaling factor, except for `dynamic`.

    Raises:
        UserError: an unknown `rope_type`, a missing, unknown or invalid setting, a model without rotary embeddings, or
            a model whose rotary embeddings are scaled already.
    """
    settings = dict(config.rope_scaling)
    if not settings:
        return hf_config
    kind = settings.pop("rope_type", None)
    if kind not in _REQUIRED:
        raise UserError(
            "no such kind", key="model.rope_scaling.rope_type", value=kind, remedy=f"Known: {', '.join(_REQUIRED)}"
        )
    text_config = hf_config.get_text_config()
    rope_parameters = getattr(text_config, "rope_parameters", None)
    if not rope_parameters or "rope_theta" not in rope_parameters:
        raise UserError(
            f"{text_config.model_type} does not have one set of RoPE parameters for all layers",
            key="model.rope_scaling",
            remedy="Remove the setting",
        )
    if rope_parameters.get("rope_type", "default") != "default":
        raise UserError(
            f"the model's positions are scaled already ({rope_parameters['rope_type']})",
            key="model.rope_scaling",
            remedy="Remove the setting, or give the unscaled model",
        )
    missing, unknown = _REQUIRED[kind] - settings.keys(), settings.keys() - _REQUIRED[kind] - _OPTIONAL.get(kind, set())
    if missing or unknown:
        problem = f"{min(missing)} is missing" if missing else f"{min(unknown)} is not one of its settings"
        accepted = ", ".join(sorted(_REQUIRED[kind] | _OPTIONAL.get(kind, set()))) or "none"
        raise UserError(problem, key="model.rope_scaling", remedy=f"Settings of {kind}: {accepted}")
    for name, value in settings.items():
        _check_value(name, value)
    _apply_settings(text_config, kind, settings, rope_parameters)
    return hf_config


def _check_value(name: str, value: Any) -> None:
    """Raises `UserError` for a value of the wrong type, not finite, or below the minimum of the setting."""
    if name == "truncate":
        if not isinstance(value, bool):
            raise UserError(
                "must be true or false",
                key="model.rope_scaling.truncate",
                value=repr(value),
                remedy="Give one of them",
            )
        return
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    if name in ("factor", "alpha", "seq_len"):
        if not is_number or value < 1:
            raise UserError(
                "must be a number of at least 1",
                key=f"model.rope_scaling.{name}",
                value=repr(value),
                remedy="Give 1 or more",
            )
    elif not is_number or value <= 0:
        raise UserError(
            "must be a number above 0",
            key=f"model.rope_scaling.{name}",
            value=repr(value),
            remedy="Give a number above 0",
        )


def _apply_settings(hf_config: Any, kind: str, settings: dict[str, Any], rope_parameters: dict[str, Any]) -> None:
    """Updates `rope_parameters` and `max_position_embeddings` of `hf_config` with checked settings."""
    max_positions = hf_config.max_position_embeddings
    theta, dim = rope_parameters["rope_theta"], head_dim(hf_config)
    if kind in ("ntk", "ntk_auto"):
        alpha = settings.get("alpha") or ntk_alpha(
            settings["seq_len"], settings.get("half_context", max_positions / 2), settings.get("coefficient", 1.0)
        )
        if alpha < 1:
            raise UserError(
                f"alpha={alpha:g} would shrink the context",
                key="model.rope_scaling",
                remedy=f"Set more than {max_positions} positions",
            )
        hf_config.rope_parameters = rope_parameters | {"rope_theta": ntk_base(theta, alpha, dim)}
        hf_config.max_position_embeddings = max(max_positions, settings.get("seq_len", round(max_positions * alpha)))
        return
    original = {"original_max_position_embeddings": max_positions} if kind in ("yarn", "llama3") else {}
    hf_config.rope_parameters = rope_parameters | settings | original | {"rope_type": kind}
    if kind in ("linear", "yarn", "llama3"):
        # Dynamic scaling compares each document's length with the pretraining context, so its value is unchanged.
        hf_config.max_position_embeddings = round(max_positions * settings["factor"])


def check_max_positions(hf_config: Any, key: str, length: int) -> None:
    """Raises `UserError` where `length`, the document length in tokens set by `key`, exceeds the model's positions."""
    hf_config = hf_config.get_text_config()
    max_positions = getattr(hf_config, "max_position_embeddings", None)
    # Dynamic NTK scaling adapts the positions to the length of each document.
    is_dynamic = (getattr(hf_config, "rope_parameters", None) or {}).get("rope_type") == "dynamic"
    if max_positions is not None and length > max_positions and not is_dynamic:
        raise UserError(
            f"the model has {max_positions} positions",
            key=key,
            value=length,
            remedy=f"Use {max_positions} or less, or extend the context with model.rope_scaling",
        )
