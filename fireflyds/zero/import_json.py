"""DeepSpeed configurations of other projects: every key is taken over, found to say the same, or refused with the remedy."""

from pathlib import Path
from typing import Any

from fireflyds.config import TrainConfig
from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.optim.optimizers import load_optimizer_spec

# What fireflyds says to DeepSpeed itself, by the key that a user gives.
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
# What follows from the rest of the configuration, or is another part's work; without effect here.
_WITHOUT_EFFECT = {
    "gradient_accumulation_steps": "it follows from global_batch_size, micro_batch_size and the number of ranks",
    "steps_per_print": "log_every says how often there is a line",
    "zero_allow_untested_optimizer": "it is always on",
    "zero_force_ds_cpu_optimizer": "the optimizer is chosen by optim.name",
    "tensorboard": "trackers are chosen by tracking=",
    "wandb": "trackers are chosen by tracking=",
    "csv_monitor": "metrics.jsonl has every step",
    "optimizer.params.torch_adam": "the optimizer is chosen by optim.name",
    "optimizer.params.adam_w_mode": "weight decay is always decoupled",
}
_RENAMED = {
    "bfloat16": "bf16",
    "zero_optimization.stage3_gather_fp16_weights_on_model_save": "zero_optimization.stage3_gather_16bit_weights_on_model_save",
}
# Keys that DeepSpeed no longer has, and what does their work.
_REMOVED = {
    "elasticity": "a run resumes on any number of GPUs by itself",
    "amp": "use hardware.precision",
    "curriculum_learning": "use data.curriculum",
    "data_efficiency": "use data.weights and data.curriculum",
    "compression_training": "quantise after training",
    "quantize_training": "quantise after training",
    "nebula": "checkpoints are written in the background (checkpoint.background)",
    "sparse_gradients": "new rows alone train with tuning.embeddings=new_rows",
    "sparse_attention": "packed attention is chosen by hardware.attention",
    "eigenvalue": "nothing replaces it",
    "graph_harvesting": "nothing replaces it",
    "progressive_layer_drop": "nothing replaces it",
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
    """What DeepSpeed is told beyond what is typed, from `zero.json` and `zero.extra`; and notes on what was left out.

    Raises:
        UserError: a key that DeepSpeed no longer has, or that says something else than this configuration.
    """
    given = []
    if config.zero.json:
        given.append((config.zero.json, read_json(Path(config.zero.json))))
    if config.zero.extra:
        given.append(("zero.extra", dict(config.zero.extra)))
    found: dict[str, Any] = {}
    notes = []
    for where, document in given:
        kept, left_out = _translate(where, document, config)
        notes += [f"note: {where}: {key} is left out: {why}" for key, why in left_out.items()]
        if kept:
            notes.append(f"note: {where}, passed to DeepSpeed as it is: {kept}")
        for key, value in kept.items():
            found[key] = found.get(key, {}) | value if isinstance(value, dict) else value
    return found, notes


def _translate(where: str, document: dict[str, Any], config: TrainConfig) -> tuple[dict[str, Any], dict[str, str]]:
    kept: dict[str, Any] = {}
    left_out: dict[str, str] = {}
    for section, value in document.items():
        inner = {f"{section}.{key}": each for key, each in value.items()} if isinstance(value, dict) else {}
        if section in _REMOVED or section in _WITHOUT_EFFECT or section in _CONFIG_KEYS or not inner:
            inner = {section: value}
        if isinstance(params := inner.pop("optimizer.params", None), dict):
            inner |= {f"optimizer.params.{key}": each for key, each in params.items()}
        for key, each in inner.items():
            key = _RENAMED.get(key.partition(".")[0], key.partition(".")[0]) + key[len(key.partition(".")[0]) :]
            key = _RENAMED.get(key, key)
            if why := _reason_to_leave_out(where, key, each, config):
                left_out[key] = why
                continue
            head, _, tail = key.partition(".")
            if tail:
                kept.setdefault(head, {})[tail] = each
            else:
                kept[key] = each
    return kept, left_out


def _reason_to_leave_out(where: str, key: str, value: Any, config: TrainConfig) -> str | None:
    """Why a key is not passed on; None: it is."""
    if _is_auto(value):
        return "auto is what this configuration says"
    if key in _REMOVED:
        if value in (False, None, 0) or (isinstance(value, dict) and value.get("enabled") is False):
            return "DeepSpeed no longer has it, and it was off"
        raise UserError(f"{where}: {key}: not taken over; {_REMOVED[key]}, and remove the key")
    if key in _WITHOUT_EFFECT:
        return _WITHOUT_EFFECT[key]
    if key in ("bf16.enabled", "fp16.enabled"):
        return _precision(where, key, value, config)
    if key == "fp16.loss_scale" and value == 0:
        return "the loss scale is dynamic"
    if key == "optimizer.type":
        name = config.optim.name
        if str(value).lower() not in ("adam", "adamw") or not load_optimizer_spec(name).is_adam:
            _refuse_difference(where, key, value, "optim.name", name)
        return f"it is optim.name={name}"
    if key in ("zero_optimization.offload_optimizer", "zero_optimization.offload_param"):
        ours = _CONFIG_KEYS[f"{key}.device"]
        if (device := value.get("device", "none")) not in ("auto", _config_value(config, ours)):
            _refuse_difference(where, f"{key}.device", device, ours, _config_value(config, ours))
        return None if set(value) - {"device"} else f"it is {ours}={device}"
    if key in _CONFIG_KEYS:
        ours = _CONFIG_KEYS[key]
        if value != _config_value(config, ours):
            _refuse_difference(where, key, value, ours, _config_value(config, ours))
        return f"it is {ours}={value}"
    if key.startswith(("fp16.", "bf16.", "optimizer.")):
        raise UserError(
            f"{where}: {key}={value}: fireflyds sets that section itself. Give hardware.* or optim.*, and remove the key"
        )
    return None


def _is_auto(value: Any) -> bool:
    """`"auto"`, or a section whose values are all that; the type of a scheduler alone says nothing."""
    if isinstance(value, dict):
        values = [each for key, each in value.items() if key != "type"]
        return bool(values) and all(map(_is_auto, values))
    return bool(value == "auto")


def _precision(where: str, key: str, value: Any, config: TrainConfig) -> str:
    name, asked = key.partition(".")[0], config.hardware.precision.name
    if value and asked not in (name, "auto"):
        _refuse_difference(where, key, value, "hardware.precision", asked)
    return f"it is hardware.precision={asked}"


def _refuse_difference(where: str, key: str, value: Any, ours: str, mine: Any) -> None:
    raise UserError(f"{where}: {key}={value}, but {ours}={mine}. Give {ours}={value}, or remove the key")


def _config_value(config: TrainConfig, key: str) -> Any:
    found: Any = config
    for part in key.split("."):
        found = getattr(found, part)
    return getattr(found, "name", found)
