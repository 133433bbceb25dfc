"""A progress bar with the time left, on rank 0."""

import contextlib
import sys
from collections.abc import Callable, Iterator

from fireflyds.types import StepMetrics


@contextlib.contextmanager
def progress(total_steps: int, done: int, shown: bool) -> Iterator[Callable[[StepMetrics], None]]:
    """Yields a function to call after every step. Without a terminal there is no bar: the log lines say it all."""
    if not (shown and sys.stderr.isatty()):
        yield lambda step: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[loss]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("train", total=total_steps, completed=done, loss="")
        yield lambda step: bar.update(task, completed=step.step, loss=f"loss {step.loss:.3f}")
