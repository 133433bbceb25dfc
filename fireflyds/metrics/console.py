"""Console output of a training run: log lines and a progress bar."""

import contextlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from fireflyds.runs import layout
from fireflyds.types import StepMetrics


def configure_logging(run_dir: Path, rank: int) -> logging.Logger:
    """Returns the logger: rank 0 logs to `train.log` and the console, every rank to `logs/rank_N.log`."""
    logger = logging.getLogger("fireflyds")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    logger.handlers.clear()
    (run_dir / layout.LOGS).mkdir(parents=True, exist_ok=True)
    handlers: list[logging.Handler] = [logging.FileHandler(layout.log_file(run_dir, rank), encoding="utf-8")]
    if rank == 0:
        handlers += [logging.FileHandler(run_dir / layout.TRAIN_LOG, encoding="utf-8"), logging.StreamHandler()]
    for handler in handlers:
        to_console = type(handler) is logging.StreamHandler
        handler.setFormatter(logging.Formatter("%(message)s" if to_console else "%(asctime)s %(message)s"))
        logger.addHandler(handler)
    return logger


def format_steps(recent: Sequence[StepMetrics], total_steps: int) -> str:
    """Formats one log line for the steps since the previous line.

    Loss and speed are means over these steps, all other values are those of the newest step. Skipped steps are included
    where there are any; data wait and the slowest rank where they exceed a twentieth of the time.
    """
    newest, seconds = recent[-1], sum(step.seconds for step in recent)
    extra = newest.extra
    fields = [
        f"step {newest.step}/{total_steps}",
        f"loss {_mean([step.loss for step in recent]):.4f}{_format_domains(recent, 'loss/', '.3f')}",
    ]
    if "bits_per_byte" in extra:
        fields.append(f"bits/byte {_means(recent, 'bits_per_byte')['bits_per_byte']:.4f}")
    fields += [f"lr {newest.lr:.2e}", f"grad_norm {newest.grad_norm:.3f}"]
    speed = sum(step.tokens_per_second * step.seconds for step in recent) / seconds
    fields.append(f"{speed:,.0f} tokens/s")
    if "mfu" in extra:
        fields.append(f"MFU {100 * sum(step.extra['mfu'] * step.seconds for step in recent) / seconds:.1f}%")
    if "memory_gib" in extra:
        fields += [f"fill {100 * extra['fill']:.1f}%", f"{extra['memory_gib']:.1f} GiB"]
    if sum(step.extra.get("data_wait_seconds", 0) for step in recent) > seconds / 20:
        fields.append(f"data wait {_mean([step.extra['data_wait_seconds'] for step in recent]):.2f} s")
    if extra.get("step_seconds_spread", 0) > newest.seconds / 20:
        fields.append(f"rank {extra['slowest_rank']:.0f} slowest by {extra['step_seconds_spread']:.2f} s")
    if "loss_scale" in extra:
        fields.append(f"loss scale {extra['loss_scale']:g}")
    if extra.get("skipped_steps"):
        fields.append(f"{extra['skipped_steps']:.0f} skipped")
    fields.append(f"{newest.tokens:,} tokens")
    if "eta_seconds" in extra:
        fields.append(f"ETA {timedelta(seconds=round(extra['eta_seconds']))}")
    return "  ".join(fields)


def _mean(values: Sequence[float]) -> float:
    """Mean of the finite values; NaN where there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return sum(finite) / len(finite) if finite else math.nan


def _means(recent: Sequence[StepMetrics], prefix: str) -> dict[str, float]:
    keys = dict.fromkeys(key for step in recent for key in step.extra if key.startswith(prefix))
    return {key: _mean([step.extra[key] for step in recent if key in step.extra]) for key in keys}


def _format_domains(recent: Sequence[StepMetrics], prefix: str, format_spec: str) -> str:
    """Formats the mean of every domain; empty where there are fewer than two."""
    means = _means(recent, prefix)
    return f" ({', '.join(f'{key.removeprefix(prefix)} {value:{format_spec}}' for key, value in means.items())})" * (
        len(means) > 1
    )


@contextlib.contextmanager
def progress_bar(total_steps: int, trained: int, visible: bool) -> Iterator[Callable[[StepMetrics], None]]:
    """Yields a function to call after every step. Without a terminal no bar is shown and the function does nothing."""
    if not (visible and sys.stderr.isatty()):
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[metrics]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("train", total=total_steps, completed=trained, metrics="")
        yield lambda step: bar.update(task, completed=step.step, metrics=_format_progress(step))


def _format_progress(step: StepMetrics) -> str:
    bits = f"  {step.extra['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in step.extra else ""
    return f"loss {step.loss:.3f}{bits}  {step.tokens_per_second:,.0f} tokens/s"
