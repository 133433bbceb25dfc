"""Import of existing DeepSpeed JSON configurations.

Every key is passed through, ignored because the typed configuration has the same value, or rejected with a remedy.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from fireflyds.config import TrainConfig
from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.optim.optimizers import load_optimizer_spec

# DeepSpeed keys that are set from fireflyds' configuration, with the keys of the latter.
_CONFIG_KEYS = {
    "train_batch_size": "global_batch_size",
    "train_micro_batch_size_per_gpu": "micro_batch_size",
    "gradient_clipping": "optim.max_grad_norm",
    "zero_optimization.stage": "zero.stage",
    "zero_optimization.reduce_bucket_size": "zero.reduce_bucket_size",
    "zero_optimization.overlap_comm": "zero.overlap_comm",
    "zero_optimization.offload_optimizer.device": "zero.offload_optimizer",
    "zero_optimization.offload_param.device": "zero.offload_param",
    "fp16.initial_scale_power": "hardware.initial_scale_power",
    "fp16.loss_scale_window": "hardware.loss_scale_window",
    "fp16.hysteresis": "hardware.hysteresis",
    "fp16.min_loss_scale": "hardware.min_loss_scale",
    "optimizer.params.lr": "optim.lr",
    "optimizer.params.betas": "optim.betas",
    "optimizer.params.eps": "optim.eps",
    "optimizer.params.weight_decay": "optim.weight_decay",
}
# Ignored keys, with the reason.
_IGNORED_KEYS = {
    "gradient_accumulation_steps": "it follows from global_batch_size, micro_batch_size and the number of ranks",
    "steps_per_print": "log_every sets the logging interval",
    "zero_allow_untested_optimizer": "it is always on",
    "zero_force_ds_cpu_optimizer": "the optimizer is chosen by optim.name",
    "tensorboard": "trackers are chosen by tracking=",
    "wandb": "trackers are chosen by tracking=",
    "csv_monitor": "metrics.jsonl records every step",
    "optimizer.params.torch_adam": "the optimizer is chosen by optim.name",
    "optimizer.params.adam_w_mode": "weight decay is always decoupled",
}
_RENAMED = {
    "bfloat16": "bf16",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": (
        "zero_optimization.stage3_gather_16bit_weights_on_model_save"
    ),
}
# Keys that DeepSpeed has removed or that are not supported, with their replacements.
_REMOVED = {
    "elasticity": "a run resumes on any number of GPUs by itself",
    "amp": "use hardware.precision",
    "curriculum_learning": "use data.curriculum",
    "data_efficiency": "use data.weights and data.curriculum",
    "compression_training": "quantise after training",
    "quantize_training": "quantise after training",
    "nebula": "checkpoints are written in the background (checkpoint.background)",
    "sparse_gradients": "use tuning.embeddings=new_rows to train new rows only",
    "sparse_attention": "packed attention is chosen by hardware.attention",
    "eigenvalue": "it has no replacement",
    "graph_harvesting": "it has no replacement",
    "progressive_layer_drop": "it has no replacement",
    "zero_optimization.mics_shard_size": "use zero_hpz_partition_size",
    "zero_optimization.mics_hierarchical_params_gather": "use zero_hpz_partition_size",
    "zero_optimization.zeropp_loco_param": "use zero_quantized_gradients",
    "zero_optimization.elastic_checkpoint": "a run resumes on any number of GPUs by itself",
    "zero_optimization.cpu_offload": "give zero.offload_optimizer=cpu",
    "zero_optimization.cpu_offload_params": "give zero.offload_param=cpu",
    "zero_optimization.cpu_offload_param": "give zero.offload_param=cpu",
    "zero_optimization.cpu_offload_use_pin_memory": "give offload_optimizer.pin_memory",
    "scheduler": "give optim.schedule and optim.warmup_steps",
}


def extra_settings(config: TrainConfig) -> tuple[dict[str, Any], list[str]]:
    """Returns DeepSpeed settings from `zero.json` and `zero.extra` that are not typed, and notes on them for the log.

    Raises:
        UserError: a key that DeepSpeed has removed, or whose value differs from this configuration.
    """
    sources = []
    if config.zero.json:
        sources.append((config.zero.json, read_json(Path(config.zero.json))))
    if config.zero.extra:
        sources.append(("zero.extra", dict(config.zero.extra)))
    merged: dict[str, Any] = {}
    notes = []
    for source, document in sources:
        settings, ignored = _translate(source, document, config)
        notes += [f"note: {source}: {key} is left out: {reason}" for key, reason in ignored.items()]
        if settings:
            notes.append(f"note: {source}, passed to DeepSpeed as it is: {settings}")
        for key, value in settings.items():
            merged[key] = merged.get(key, {}) | value if isinstance(value, dict) else value
    return merged, notes


def _translate(source: str, document: dict[str, Any], config: TrainConfig) -> tuple[dict[str, Any], dict[str, str]]:
    """Returns the settings to pass to DeepSpeed, nested as there, and the ignored keys with the reasons."""
    settings: dict[str, Any] = {}
    ignored: dict[str, str] = {}
    for section, value in document.items():
        flat = {f"{section}.{key}": setting for key, setting in value.items()} if isinstance(value, dict) else {}
        if section in _REMOVED or section in _IGNORED_KEYS or section in _CONFIG_KEYS or not flat:
            flat = {section: value}
        if isinstance(params := flat.pop("optimizer.params", None), dict):
            flat |= {f"optimizer.params.{key}": setting for key, setting in params.items()}
        for key, setting in flat.items():
            key = _RENAMED.get(key.partition(".")[0], key.partition(".")[0]) + key[len(key.partition(".")[0]) :]
            key = _RENAMED.get(key, key)
            if reason := _ignore_reason(source, key, setting, config):
                ignored[key] = reason
                continue
            head, _, tail = key.partition(".")
            if tail:
                settings.setdefault(head, {})[tail] = setting
            else:
                settings[key] = setting
    return settings, ignored


def _ignore_reason(source: str, key: str, value: Any, config: TrainConfig) -> str | None:
    """Returns the reason why a key is not passed to DeepSpeed; None where it is."""
    if _is_auto(value):
        return "auto: this configuration sets the value"
    if key in _REMOVED:
        if value in (False, None, 0) or (isinstance(value, dict) and value.get("enabled") is False):
            return "DeepSpeed no longer has it, and it is off"
        raise UserError(f"{key} is not supported", key=source, remedy=f"Remove the key; {_REMOVED[key]}")
    if key in _IGNORED_KEYS:
        return _IGNORED_KEYS[key]
    if key == "fp16.loss_scale" and value == 0:
        return "the loss scale is dynamic"
    if check := _CHECKS.get(key):
        return check(source, key, value, config)
    if key in _CONFIG_KEYS:
        config_key = _CONFIG_KEYS[key]
        if value != _config_value(config, config_key):
            _raise_conflict(source, key, value, config_key, _config_value(config, config_key))
        return f"it is {config_key}={value}"
    if key.startswith(("fp16.", "bf16.", "optimizer.")):
        raise UserError(
            f"{key}={value}: fireflyds sets that section itself",
            key=source,
            remedy="Set hardware.* or optim.*, and remove the key",
        )
    return None


def _is_auto(value: Any) -> bool:
    """True for `"auto"`, or a section whose values, except `type`, are all `"auto"`."""
    if isinstance(value, dict):
        values = [setting for key, setting in value.items() if key != "type"]
        return bool(values) and all(map(_is_auto, values))
    return bool(value == "auto")


def _check_precision(source: str, key: str, value: Any, config: TrainConfig) -> str:
    """Returns the reason to ignore `bf16.enabled` or `fp16.enabled`. Raises `UserError` for another precision."""
    name, configured = key.partition(".")[0], config.hardware.precision.name
    if value and configured not in (name, "auto"):
        _raise_conflict(source, key, value, "hardware.precision", configured)
    return f"it is hardware.precision={configured}"


def _check_optimizer(source: str, key: str, value: Any, config: TrainConfig) -> str:
    """Returns the reason to ignore `optimizer.type`. Raises `UserError` for another optimizer than Adam."""
    name = config.optim.name
    if str(value).lower() not in ("adam", "adamw") or not load_optimizer_spec(name).is_adam:
        _raise_conflict(source, key, value, "optim.name", name)
    return f"it is optim.name={name}"


def _check_offload(source: str, key: str, value: Any, config: TrainConfig) -> str | None:
    """Returns the reason to ignore an offload section; None where it has settings other than the device.

    Raises:
        UserError: another device than the configuration's.
    """
    config_key = _CONFIG_KEYS[f"{key}.device"]
    if (device := value.get("device", "none")) not in ("auto", _config_value(config, config_key)):
        _raise_conflict(source, f"{key}.device", device, config_key, _config_value(config, config_key))
    return None if set(value) - {"device"} else f"it is {config_key}={device}"


# Keys whose comparison with the configuration needs more than equality.
_CHECKS: dict[str, Callable[[str, str, Any, TrainConfig], str | None]] = {
    "bf16.enabled": _check_precision,
    "fp16.enabled": _check_precision,
    "optimizer.type": _check_optimizer,
    "zero_optimization.offload_optimizer": _check_offload,
    "zero_optimization.offload_param": _check_offload,
}


def _raise_conflict(source: str, key: str, value: Any, config_key: str, configured: Any) -> None:
    raise UserError(
        f"{key}={value}, but {config_key}={configured}",
        key=source,
        remedy=f"Give {config_key}={value}, or remove the key",
    )


def _config_value(config: TrainConfig, key: str) -> Any:
    """Returns the value of a dotted key of the configuration; for an enum its name."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return getattr(value, "name", value)
