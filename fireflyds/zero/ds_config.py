"""The configuration dictionary that DeepSpeed is given."""

from typing import Any

from fireflyds.config import Offload, Precision, TrainConfig
from fireflyds.optim.optimizers import gradient_clipping, load_optimizer_spec
from fireflyds.zero import import_json as deepspeed_json


def build_ds_config(config: TrainConfig, precision: Precision, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's dict. Clipping is always said: from 0.19 on silence means 1.0."""
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
    extra, _ = deepspeed_json.extra_settings(config)
    for key, value in extra.pop("zero_optimization", {}).items():
        # Of offloading the device is typed; how large its buffers are is not.
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
        **extra,
    }
