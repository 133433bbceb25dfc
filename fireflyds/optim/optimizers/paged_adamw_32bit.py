"""bitsandbytes' AdamW whose states may leave the GPU when memory is short; on a CPU nothing is paged."""

from collections.abc import Sequence

import torch

from fireflyds.config import TrainConfig
from fireflyds.optim.compatibility import refuse_offload
from fireflyds.optim.optimizers import BITSANDBYTES_MAX_ELEMENTS, OptimizerSpec, ParamGroup


def build(groups: Sequence[ParamGroup], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes, with float32 moments in memory that is paged between GPU and host."""
    import bitsandbytes.optim

    settings, betas = [group.settings() for group in groups], (config.optim.betas[0], config.optim.betas[1])
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.PagedAdamW32bit(settings, betas=betas, eps=config.optim.eps)
    return optimizer


OPTIMIZER = OptimizerSpec(
    build, state_bytes=8, check=refuse_offload, is_adam=True, max_elements=BITSANDBYTES_MAX_ELEMENTS
)
