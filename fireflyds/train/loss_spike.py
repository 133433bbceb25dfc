"""Spikes of the loss, and going back from them."""

import math
from statistics import fmean

from fireflyds.config import RecoveryConfig
from fireflyds.errors import UserError
from fireflyds.types import TrainState

# Losses by which a spike is known, at most and at least.
_WINDOW, _LEAST = 100, 10


def is_spike(state: TrainState, loss: float, config: RecoveryConfig) -> bool:
    """Whether this step's loss stands out of the last ones; otherwise it becomes one of them. The same on all ranks."""
    if config.rollback_above is None or not math.isfinite(loss):
        return False
    recent = state.recent_losses
    if len(recent) >= _LEAST and loss > config.rollback_above * fmean(recent):
        return True
    recent.append(loss)
    del recent[:-_WINDOW]
    return False


def rollback(spoilt: TrainState, saved: TrainState, config: RecoveryConfig) -> None:
    """Let the saved state go on behind the data that led to the spike.

    Raises:
        UserError: this has happened too often.
    """
    saved.skipped_batches = spoilt.skipped_batches + spoilt.step - saved.step
    saved.rollbacks = spoilt.rollbacks + 1
    if saved.rollbacks > config.max_rollbacks:
        raise UserError(
            f"step {spoilt.step}: the loss spikes again after {config.max_rollbacks} rollbacks (recovery.max_rollbacks). The newest "
            "checkpoint is whole. Lower optim.lr, look at the data, or raise recovery.rollback_above"
        )
