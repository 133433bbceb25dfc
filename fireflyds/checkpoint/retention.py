"""Which checkpoints stay."""

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
    """A whole checkpoint; `metric` is that of `checkpoint.best_metric` when it was saved."""

    step: int
    num_bytes: int
    metric: float | None = None


def read_checkpoint_info(folder: Path, step: int, metric: str) -> CheckpointInfo:
    return CheckpointInfo(step, num_bytes_of(folder), _recorded_metric(folder, metric) if metric else None)


def _recorded_metric(folder: Path, metric: str) -> float | None:
    try:
        found: float | None = read_json(folder / MANIFEST).get("metrics", {}).get(metric)
    except UserError:  # damaged since: it cannot be the best
        return None
    return found


def checkpoints_to_delete(kept: list[CheckpointInfo], config: CheckpointConfig) -> list[int]:
    """Steps to remove: all but the last `keep`, every `keep_every`-th and the best.

    Beyond `max_gib` the oldest go, the best after all others; the newest always stays.
    """
    ordered = sorted(kept, key=lambda each: each.step)
    newest = {each.step for each in ordered[-config.keep :]}
    best = _best_step(ordered)
    stay = [
        each
        for each in ordered
        if each.step in newest or each.step == best or (config.keep_every and each.step % config.keep_every == 0)
    ]
    limit = math.inf if config.max_gib is None else config.max_gib * 2**30
    while len(stay) > 1 and sum(each.num_bytes for each in stay) > limit:
        others = [each for each in stay[:-1] if each.step != best]
        stay.remove(others[0] if others else stay[0])
    steps = {each.step for each in stay}
    return [each.step for each in ordered if each.step not in steps]


def _best_step(ordered: list[CheckpointInfo]) -> int | None:
    """The step of the lowest metric; the earlier of two."""
    measured = [each for each in ordered if each.metric is not None and math.isfinite(each.metric)]
    return min(measured, key=lambda each: (each.metric, each.step)).step if measured else None
