"""Retention policy: the checkpoints to keep and to delete."""

import math
from dataclasses import dataclass
from pathlib import Path

from fireflyds.checkpoint.shard_files import MANIFEST
from fireflyds.checkpoint.storage import num_bytes_of
from fireflyds.config import CheckpointConfig
from fireflyds.errors import UserError
from fireflyds.fs import read_json


@dataclass(frozen=True, slots=True)
class CheckpointInfo:
    """A complete checkpoint. `metric`: value of `checkpoint.best_metric` when it was saved."""

    step: int
    num_bytes: int
    metric: float | None = None


def read_checkpoint_info(folder: Path, step: int, metric: str) -> CheckpointInfo:
    """Returns step, size in bytes and recorded value of `metric` (None if empty or absent) of a checkpoint folder."""
    return CheckpointInfo(step, num_bytes_of(folder), _recorded_metric(folder, metric) if metric else None)


def _recorded_metric(folder: Path, metric: str) -> float | None:
    try:
        value: float | None = read_json(folder / MANIFEST).get("metrics", {}).get(metric)
    except UserError:  # damaged after it was saved: it cannot be the best
        return None
    return value


def checkpoints_to_delete(checkpoints: list[CheckpointInfo], config: CheckpointConfig) -> list[int]:
    """Steps of the checkpoints to delete: all except the last `keep`, every `keep_every`-th and the best.

    Above `max_gib` in total the oldest are deleted, the best after all others; the newest is always kept.
    """
    ordered = sorted(checkpoints, key=lambda info: info.step)
    newest = {info.step for info in ordered[-config.keep :]}
    best = _best_step(ordered)
    retained = [
        info
        for info in ordered
        if info.step in newest or info.step == best or (config.keep_every and info.step % config.keep_every == 0)
    ]
    limit = math.inf if config.max_gib is None else config.max_gib * 2**30
    while len(retained) > 1 and sum(info.num_bytes for info in retained) > limit:
        others = [info for info in retained[:-1] if info.step != best]
        retained.remove(others[0] if others else retained[0])
    retained_steps = {info.step for info in retained}
    return [info.step for info in ordered if info.step not in retained_steps]


def _best_step(ordered: list[CheckpointInfo]) -> int | None:
    """The step of the lowest metric, the earliest of equal ones; None if no metric was recorded."""
    measured = [info for info in ordered if info.metric is not None and math.isfinite(info.metric)]
    return min(measured, key=lambda info: (info.metric, info.step)).step if measured else None
