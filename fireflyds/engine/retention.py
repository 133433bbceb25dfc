"""Which checkpoints stay."""

import math
from dataclasses import dataclass
from pathlib import Path

from fireflyds.config import CheckpointConfig
from fireflyds.directories import read_json
from fireflyds.engine.fragments import MANIFEST
from fireflyds.errors import UserError


@dataclass(frozen=True, slots=True)
class Kept:
    """A whole checkpoint; `metric` is that of `checkpoint.best_metric` when it was saved."""

    step: int
    num_bytes: int
    metric: float | None = None


def read_kept(folder: Path, step: int, metric: str) -> Kept:
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Kept(step, size, _measured(folder, metric) if metric else None)


def _measured(folder: Path, metric: str) -> float | None:
    try:
        found: float | None = read_json(folder / MANIFEST).get("metrics", {}).get(metric)
    except UserError:  # damaged since: it cannot be the best
        return None
    return found


def to_drop(kept: list[Kept], config: CheckpointConfig) -> list[int]:
    """Steps to remove: all but the last `keep`, every `keep_every`-th and the best.

    Beyond `max_gib` the oldest go, the best after all others; the newest always stays.
    """
    ordered = sorted(kept, key=lambda each: each.step)
    newest = {each.step for each in ordered[-config.keep :]}
    best = _best(ordered)
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


def _best(ordered: list[Kept]) -> int | None:
    """The step of the lowest metric; the earlier of two."""
    measured = [each for each in ordered if each.metric is not None and math.isfinite(each.metric)]
    return min(measured, key=lambda each: (each.metric, each.step)).step if measured else None
