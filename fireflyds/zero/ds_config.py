"""The configuration dictionary that DeepSpeed is given."""

from typing import Any

from fireflyds.config import Offload, Optimizer, Precision, TrainConfig
from fireflyds.optim import optimizers
from fireflyds.zero import import_json as deepspeed_json


def build_ds_config(config: TrainConfig, precision: Precision, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's dict. Clipping is always said: from 0.19 on silence means 1.0."""
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "reduce_bucket_size": config.zero.reduce_bucket_size,
        "overlap_comm": config.zero.overlap_comm,
    }
    if config.optim.name is Optimizer.muon:
        # Muon needs whole gradients of matrices.
        zero["reduce_scatter"] = False
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
        "gradient_clipping": optimizers.gradient_clipping(config.optim),
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
