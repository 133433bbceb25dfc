"""Detection of loss spikes, and rollback to the newest checkpoint."""

import math
from statistics import fmean

from fireflyds.config import RecoveryConfig
from fireflyds.errors import DivergedError
from fireflyds.types import TrainState

# Maximum and minimum number of recent losses whose mean is the baseline of spike detection.
_MAX_LOSSES, _MIN_LOSSES = 100, 10


def is_spike(state: TrainState, loss: float, config: RecoveryConfig) -> bool:
    """True where `loss` is a spike relative to the recent losses; otherwise appends it. The same on all ranks."""
    if config.rollback_above is None or not math.isfinite(loss):
        return False
    recent = state.recent_losses
    if len(recent) >= _MIN_LOSSES and loss > config.rollback_above * fmean(recent):
        return True
    recent.append(loss)
    del recent[:-_MAX_LOSSES]
    return False


def rollback(diverged: TrainState, saved: TrainState, config: RecoveryConfig) -> None:
    """Advances the data position of the saved state past the global batches that led to the spike.

    Raises:
        DivergedError: there were more than `recovery.max_rollbacks` rollbacks.
    """
    saved.skipped_batches = diverged.skipped_batches + diverged.step - saved.step
    saved.rollbacks = diverged.rollbacks + 1
    if saved.rollbacks > config.max_rollbacks:
        raise DivergedError(
            f"the loss spikes again after {config.max_rollbacks} rollbacks. The newest checkpoint is intact",
            key="recovery.max_rollbacks",
            value=config.max_rollbacks,
            remedy="Lower optim.lr, inspect the data, or raise recovery.rollback_above",
        ).within(f"step {diverged.step}")
