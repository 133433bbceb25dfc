"""What a person reads while a run trains: log lines and a progress bar."""

import contextlib
import logging
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path

from fireflyds.types import StepMetrics


def configure_logging(run_dir: Path, rank: int) -> logging.Logger:
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


def format_steps(recent: Sequence[StepMetrics], total_steps: int) -> str:
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


@contextlib.contextmanager
def progress_bar(total_steps: int, done: int, shown: bool) -> Iterator[Callable[[StepMetrics], None]]:
    """Yields a function to call after every step. Without a terminal there is no bar: the log lines say it all."""
    if not (shown and sys.stderr.isatty()):
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("train", total=total_steps, completed=done, said="")
        yield lambda step: bar.update(task, completed=step.step, said=_describe(step))


def _describe(step: StepMetrics) -> str:
    bits = f"  {step.extra['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in step.extra else ""
    return f"loss {step.loss:.3f}{bits}  {step.tokens_per_second:,.0f} tokens/s"
