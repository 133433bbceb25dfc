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

    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[said]}"), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("train", total=total_steps, completed=done, said="")
        yield lambda step: bar.update(task, completed=step.step, said=_said(step))


def _said(step: StepMetrics) -> str:
    bits = f"  {step.extra['bits_per_byte']:.3f} bits/byte" if "bits_per_byte" in step.extra else ""
    return f"loss {step.loss:.3f}{bits}  {step.tokens_per_second:,.0f} tokens/s"
