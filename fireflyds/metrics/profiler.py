"""Profiles of chosen training steps: `torch.profiler` traces and tables of operators, in `profile/` of the run."""

import contextlib
import gzip
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any

from fireflyds.config.profile import ProfileConfig
from fireflyds.fs import atomic_write_text, fsync
from fireflyds.runs.layout import PROFILE
from fireflyds.types import StepMetrics

Span = Callable[[str], AbstractContextManager[Any]]
"""Marks a part of a step, such as `forward`, in the trace."""

TABLE_ROWS = 50


class StepProfiler:
    """Context manager. Records the steps of `profile.start` and `profile.steps`, and what happens between them.

    The files are written after the last of these steps, or where the run ends or rolls back before it. They are named
    by the steps whose recording began. A failing profiler logs one warning; training continues.
    """

    def __init__(self, config: ProfileConfig, run_dir: Path, rank: int, log: logging.Logger) -> None:
        self._config, self._folder, self._rank, self._log = config, run_dir / PROFILE, rank, log
        self._profile: Any = None
        self._is_done = not config.start or rank not in config.ranks
        self._first = self._newest = 0

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finish()

    def span(self, name: str) -> AbstractContextManager[Any]:
        """Marks a part of a step in the trace; does nothing outside of the recorded steps."""
        if self._profile is None:
            return nullcontext()
        from torch.profiler import record_function

        return record_function(name)

    def follow(self, steps: Iterator[StepMetrics], trained: int, total_steps: int) -> Iterator[StepMetrics]:
        """Yields `steps`, which are the steps after `trained` to `total_steps`, and records those of the range."""
        return steps if self._is_done or self._config.last <= trained else self._follow(steps, trained, total_steps)

    def _follow(self, steps: Iterator[StepMetrics], trained: int, total_steps: int) -> Iterator[StepMetrics]:
        try:
            for number in range(trained + 1, total_steps + 1):
                with self._step(number):
                    step = next(steps)
                if number == self._config.last:
                    self._is_done = True
                    self._finish()
                yield step
        finally:
            self._finish()

    def _step(self, number: int) -> AbstractContextManager[Any]:
        if self._is_done or not self._config.start <= number <= self._config.last:
            return nullcontext()
        if self._profile is None:
            self._start(number)
        self._newest = number
        # The name that torch.profiler gives to steps, so viewers recognise it; the number is that of the run's step.
        return self.span(f"ProfilerStep#{number}")

    def _start(self, number: int) -> None:
        from torch import cuda, profiler

        activities = [profiler.ProfilerActivity.CPU] + [profiler.ProfilerActivity.CUDA] * cuda.is_available()
        memory, stacks = self._config.memory, self._config.stacks
        try:
            profile = profiler.profile(activities=activities, profile_memory=memory, with_stack=stacks)
            profile.start()
        except Exception as error:  # another profiler may hold the device
            self._warn("cannot record", error)
            return
        self._profile, self._first = profile, number

    def _finish(self) -> None:
        """Stops the recording and writes its files. Does nothing where no step is being recorded."""
        if self._profile is None:
            return
        profile, self._profile = self._profile, None
        name = f"rank-{self._rank}.steps-{self._first}-{self._newest}"
        try:
            profile.stop()
            self._folder.mkdir(parents=True, exist_ok=True)
            _write_trace(profile, self._folder / f"{name}.trace.json.gz")
            atomic_write_text(self._folder / f"{name}.txt", _format_table(profile))
        except Exception as error:  # neither a full disk nor a failed profiler ends a run or replaces its exception
            self._warn("was not written", error)
            return
        self._log.info(
            f"profile of steps {self._first} to {self._newest} on rank {self._rank}: "
            f"{self._folder / name}.trace.json.gz (open it in https://ui.perfetto.dev) and .txt"
        )

    def _warn(self, what: str, error: Exception) -> None:
        self._is_done = True
        self._log.warning(f"profile of rank {self._rank}: {what} ({str(error) or type(error).__name__})")


def _write_trace(profile: Any, target: Path) -> None:
    """Writes the Chrome trace atomically: beside its place, compressed, and renamed."""
    plain, packed = (target.with_name(f".{target.name}.{suffix}") for suffix in ("plain", "partial"))
    try:
        profile.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=4) as sink:
            shutil.copyfileobj(source, sink, 1 << 20)
        fsync(packed)
        os.replace(packed, target)
    finally:
        for file in (plain, packed):
            with contextlib.suppress(OSError):
                file.unlink(missing_ok=True)


def _format_table(profile: Any) -> str:
    """Formats the operators with the largest time of their own, on the device where there is one."""
    from torch import cuda

    order = "self_cuda_time_total" if cuda.is_available() else "self_cpu_time_total"
    table: str = profile.key_averages().table(sort_by=order, row_limit=TABLE_ROWS, max_name_column_width=80)
    return table
