"""What a run leaves to read: `metrics.jsonl`, `train.log`, a progress bar, `loss.png`."""

import json
import logging
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np

from fireflyds.directories import write_whole
from fireflyds.errors import UserError
from fireflyds.types import StepMetrics


class RowsFile:
    """A JSON line for everything that happened at a step. On resume, lines after the checkpoint's step are cut away."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.kept = [row for row in read_metrics(path) if row["step"] <= resumed_at]
        """What stood there before."""
        write_whole(path, "".join(_json(row) for row in self.kept))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        try:
            self._stream.write(_json(row))
            self._stream.flush()
        except OSError as error:
            raise UserError(
                f"{self._stream.name}: cannot be written ({error.strerror}). Make room, and give the same command again"
            ) from error

    def sync(self) -> None:
        """Wait for the disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        self._stream.close()


class MetricsFile(RowsFile):
    """`metrics.jsonl`: a line for every optimizer step. What is no number is null."""

    def __init__(self, run_dir: Path, resumed_at: int) -> None:
        super().__init__(run_dir / "metrics.jsonl", resumed_at)

    def record(self, metrics: StepMetrics) -> dict[str, Any]:
        row = finite(metrics.as_dict())
        self.write(row)
        return row


def finite(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row for JSON, which has no word for what is no number: null."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file; a last line cut off by a kill is passed over."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield json.loads(line)


def logger(run_dir: Path, rank: int) -> logging.Logger:
    """Rank 0 logs to `train.log` and the console, every rank to `logs/rank_N.log`."""
    made = logging.getLogger("fireflyds")
    made.setLevel(logging.INFO)
    made.propagate = False
    made.handlers.clear()
    (run_dir / "logs").mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(run_dir / "logs" / f"rank_{rank}.log", encoding="utf-8")]
    if rank == 0:
        handlers += [logging.FileHandler(run_dir / "train.log", encoding="utf-8"), logging.StreamHandler()]
    for handler in handlers:
        console = type(handler) is logging.StreamHandler
        handler.setFormatter(logging.Formatter("%(message)s" if console else "%(asctime)s %(message)s"))
        made.addHandler(handler)
    return made


def line(recent: Sequence[StepMetrics], total_steps: int) -> str:
    """One line for the steps since the last line: their mean loss and speed, the newest of everything else.

    Skipped steps, waiting for data and a slow rank are told where there are any (more than a twentieth of the time).
    """
    newest, seconds = recent[-1], sum(step.seconds for step in recent)
    of = newest.extra
    found = [
        f"step {newest.step}/{total_steps}",
        f"loss {_mean([step.loss for step in recent]):.4f}{_by_domain(recent, 'loss/', '.3f')}",
    ]
    if "bits_per_byte" in of:
        found.append(f"bits/byte {_means(recent, 'bits_per_byte')['bits_per_byte']:.4f}")
    found += [f"lr {newest.lr:.2e}", f"grad_norm {newest.grad_norm:.3f}"]
    speed = sum(step.tokens_per_second * step.seconds for step in recent) / seconds
    found.append(f"{speed:,.0f} tokens/s")
    if "mfu" in of:
        found.append(f"MFU {100 * sum(step.extra['mfu'] * step.seconds for step in recent) / seconds:.1f}%")
    if "memory_gib" in of:
        found += [f"fill {100 * of['fill']:.1f}%", f"{of['memory_gib']:.1f} GiB"]
    if sum(step.extra.get("data_wait_seconds", 0) for step in recent) > seconds / 20:
        found.append(f"data wait {_mean([step.extra['data_wait_seconds'] for step in recent]):.2f} s")
    if of.get("step_seconds_spread", 0) > newest.seconds / 20:
        found.append(f"rank {of['slowest_rank']:.0f} slowest by {of['step_seconds_spread']:.2f} s")
    if "loss_scale" in of:
        found.append(f"loss scale {of['loss_scale']:g}")
    if of.get("skipped_steps"):
        found.append(f"{of['skipped_steps']:.0f} skipped")
    found.append(f"{newest.tokens:,} tokens")
    if "eta_seconds" in of:
        found.append(f"ETA {timedelta(seconds=round(of['eta_seconds']))}")
    return "  ".join(found)


def _mean(values: Sequence[float]) -> float:
    """Of those that are numbers."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _means(recent: Sequence[StepMetrics], prefix: str) -> dict[str, float]:
    keys = dict.fromkeys(key for step in recent for key in step.extra if key.startswith(prefix))
    return {key: _mean([step.extra[key] for step in recent if key in step.extra]) for key in keys}


def _by_domain(recent: Sequence[StepMetrics], prefix: str, form: str) -> str:
    """Of the domains, where there are several."""
    found = _means(recent, prefix)
    return f" ({', '.join(f'{key.removeprefix(prefix)} {value:{form}}' for key, value in found.items())})" * (
        len(found) > 1
    )


def running_mean(values: Sequence[float], width: int) -> np.ndarray:
    """The mean of every `width` values in a row.

    Blocks of `width` are summed from their start and to their end; a window is the end of one and the start of the next.
    Nothing is subtracted, so one huge loss does not blur the others.
    """
    blocks = np.zeros((-(-len(values) // width), width))
    blocks.flat[: len(values)] = values
    from_start, to_end = np.cumsum(blocks, 1).ravel(), np.cumsum(blocks[:, ::-1], 1)[:, ::-1].ravel()
    starts = np.arange(len(values) - width + 1)
    return (from_start[starts + width - 1] + np.where(starts % width, to_end[starts], 0)) / width


def plot_loss(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss over tokens, one curve per run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    try:
        for name, every in curves.items():
            rows = [row for row in every if row["loss"] is not None]
            width = max(1, len(rows) // 50)  # one step's loss says more of its documents than of the model
            means = running_mean([row["loss"] for row in rows], width)
            axes.plot([row["tokens"] for row in rows[width - 1 :]], means, label=name, linewidth=1.2)
        axes.set(xlabel="tokens", ylabel="loss per learned token (nats)")
        axes.grid(alpha=0.3)
        if len(curves) > 1:
            axes.legend()
        figure.tight_layout()
        aside = path.with_name(f".{path.name}.partial.png")
        figure.savefig(aside)
        os.replace(aside, path)
    finally:
        pyplot.close(figure)
