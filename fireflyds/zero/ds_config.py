"""The configuration dictionary of `deepspeed.initialize`."""

from typing import Any

from fireflyds.config import Offload, Precision, TrainConfig
from fireflyds.optim.optimizers import gradient_clipping, load_optimizer_spec
from fireflyds.zero.import_json import extra_settings


def build_ds_config(config: TrainConfig, precision: Precision, accumulation: int) -> dict[str, Any]:
    """Builds DeepSpeed's configuration dictionary.

    `gradient_clipping` is always set: from DeepSpeed 0.19 on the default is 1.0. `accumulation`: micro-batches a step.
    """
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "reduce_bucket_size": config.zero.reduce_bucket_size,
        "overlap_comm": config.zero.overlap_comm,
        **load_optimizer_spec(config.optim.name).zero_optimization,
    }
    if config.zero.offload_optimizer is not Offload.none:
        zero["offload_optimizer"] = {"device": config.zero.offload_optimizer.name}
    if config.zero.offload_param is not Offload.none:
        zero["offload_param"] = {"device": config.zero.offload_param.name}
    extra, _ = extra_settings(config)
    for key, value in extra.pop("zero_optimization", {}).items():
        # The device of offloading is a typed setting; its other keys, such as buffer sizes, are passed through.
        zero[key] = zero[key] | value if isinstance(value, dict) and key in zero else value
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": gradient_clipping(config),
        "bf16": {"enabled": precision is Precision.bf16},
        "fp16": {
            "enabled": precision is Precision.fp16,
            "initial_scale_power": config.hardware.initial_scale_power,
            "loss_scale_window": config.hardware.loss_scale_window,
            "hysteresis": config.hardware.hysteresis,
            "min_loss_scale": config.hardware.min_loss_scale,
        },
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        # DeepSpeed's throughput timer waits for the device twice in every micro-batch; the metrics have their own.
        "timers": {"throughput": {"enabled": False}},
        **extra,
    }
