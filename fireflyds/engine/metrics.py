"""What a run leaves to read: `metrics.jsonl`, `train.log`, a progress bar, `loss.png`."""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fireflyds.directories import write_whole
from fireflyds.types import StepMetrics


class MetricsFile:
    """One JSON line per optimizer step. On resume, lines after the checkpoint's step are cut away."""

    def __init__(self, run_dir: Path, resumed_at: int) -> None:
        path = run_dir / "metrics.jsonl"
        kept = [row for row in read_metrics(path) if row["step"] <= resumed_at]
        write_whole(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        row = {key: value if math.isfinite(value) else None for key, value in metrics.as_dict().items()}
        self._stream.write(json.dumps(row) + "\n")
        self._stream.flush()

    def close(self) -> None:
        self._stream.close()


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a metrics file; a last line cut off by a kill is passed over."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
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
    """One line for the steps since the last line: their mean loss and speed, the newest of everything else."""
    newest = recent[-1]
    loss = sum(step.loss for step in recent) / len(recent)
    speed = sum(step.tokens_per_second * step.seconds for step in recent) / sum(step.seconds for step in recent)
    return (
        f"step {newest.step}/{total_steps}  loss {loss:.4f}  lr {newest.lr:.2e}  grad_norm {newest.grad_norm:.3f}  "
        f"{speed:,.0f} tokens/s  {newest.tokens:,} tokens"
    )


def plot_loss(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    """Loss over tokens, one curve per run."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    for name, rows in curves.items():
        width = max(1, len(rows) // 50)  # a running mean: one step's loss says more of its documents than of the model
        means = [sum(row["loss"] for row in rows[at : at + width]) / width for at in range(len(rows) - width + 1)]
        axes.plot([row["tokens"] for row in rows[width - 1 :]], means, label=name, linewidth=1.2)
    axes.set(xlabel="tokens", ylabel="loss per learned token (nats)")
    axes.grid(alpha=0.3)
    if len(curves) > 1:
        axes.legend()
    figure.tight_layout()
    aside = path.with_name(f".{path.name}.partial.png")
    figure.savefig(aside)
    os.replace(aside, path)
    pyplot.close(figure)
