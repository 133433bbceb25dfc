"""AdamW: fused on a GPU; DeepSpeed's CPU Adam where `zero.offload_optimizer` is on."""

from collections.abc import Sequence

import torch

from fireflyds.config import Offload, TrainConfig
from fireflyds.errors import UserError
from fireflyds.optim.optimizers import OptimizerSpec, ParamGroup


def build(groups: Sequence[ParamGroup], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW: torch's fused version on the GPU, DeepSpeed's CPU version for an offloaded optimizer."""
    settings = [group.settings() for group in groups]
    betas, eps = (config.optim.betas[0], config.optim.betas[1]), config.optim.eps
    if config.zero.offload_optimizer is Offload.none:
        return torch.optim.AdamW(settings, betas=betas, eps=eps, fused=torch.cuda.is_available())
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        optimizer: torch.optim.Optimizer = DeepSpeedCPUAdam(settings, betas=betas, eps=eps)
    except RuntimeError as error:
        raise UserError(
            f"DeepSpeed's CPU Adam cannot be built here ({error.__cause__ or error})",
            key="zero.offload_optimizer",
            value="cpu",
            remedy="Install ninja and a C++ compiler, or use zero.offload_optimizer=none",
        ) from error
    return optimizer


OPTIMIZER = OptimizerSpec(build, state_bytes=8, is_adam=True, cpu_step_copies=2)
