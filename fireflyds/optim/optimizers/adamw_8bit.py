"""bitsandbytes' AdamW with states of one byte each; groups of fewer than 4096 numbers keep four."""

from collections.abc import Sequence

import torch

from fireflyds.config import TrainConfig
from fireflyds.optim.compatibility import refuse_offload
from fireflyds.optim.optimizers import BITSANDBYTES_MAX_ELEMENTS, OptimizerSpec, ParamGroup


def build(groups: Sequence[ParamGroup], config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW of bitsandbytes, with moments quantised to 8 bits in blocks."""
    import bitsandbytes.optim

    settings, betas = [group.settings() for group in groups], (config.optim.betas[0], config.optim.betas[1])
    optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(settings, betas=betas, eps=config.optim.eps)
    return optimizer


OPTIMIZER = OptimizerSpec(
    build, state_bytes=2, check=refuse_offload, is_adam=True, max_elements=BITSANDBYTES_MAX_ELEMENTS
)
