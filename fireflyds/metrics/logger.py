"""Logging of training metrics: every step to `metrics.jsonl`, the tracker, the progress bar and the log; at every
checkpoint `trainer_state.json` and `loss.png`."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from fireflyds.metrics.console import format_steps, progress_bar
from fireflyds.metrics.history import History
from fireflyds.metrics.trackers import Tracker
from fireflyds.runs import layout
from fireflyds.runs.jsonl import MetricsFile, read_jsonl, without_nan
from fireflyds.runs.layout import EXIT_FAILED
from fireflyds.types import StepMetrics

_HISTORY_FILES = f"{layout.TRAINER_STATE} or {layout.LOSS_PLOT}"


class MetricsLogger:
    """Context manager. Rank 0 writes the files and shows the progress bar; other ranks only log to their own file."""

    def __init__(
        self,
        run_dir: Path,
        tracker: Tracker,
        log: logging.Logger,
        rank: int,
        step: int,
        total_steps: int,
        log_every: int,
        steps_per_epoch: float,
    ) -> None:
        self._run_dir, self._tracker, self.log = run_dir, tracker, log
        self._total_steps, self._log_every, self._steps_per_epoch = total_steps, log_every, steps_per_epoch
        self._recent: list[StepMetrics] = []
        self._file: MetricsFile | None = None
        self._pending_plot: Future[None] | None = None
        self._stack = contextlib.ExitStack()
        try:
            if rank == 0:
                self._open(step)
            # Plotting takes longer than a step, so it runs in a thread.
            self._plot_executor = self._stack.enter_context(ThreadPoolExecutor(1, "loss-plot"))
            self._advance = self._stack.enter_context(progress_bar(total_steps, step, rank == 0))
        except BaseException:
            # This object owns the tracker, and `__exit__` is not called where the constructor raises.
            self._stack.close()
            tracker.finish(EXIT_FAILED)
            raise

    def __enter__(self) -> "MetricsLogger":
        return self

    def _open(self, step: int) -> None:
        self._file = MetricsFile(self._run_dir, step)
        self._history = History(self._run_dir, self._total_steps, self._log_every, self._steps_per_epoch)
        for row in self._file.kept:
            self._history.add(row)
        for row in read_jsonl(self._run_dir / layout.VALIDATION):
            if row["step"] <= step:
                self._history.add_validation(row)

    def rollback(self, step: int) -> None:
        """Discards the metrics of all steps after `done`, the step of the restored checkpoint."""
        self._recent.clear()
        if self._file:
            self._file.close()
            self._open(step)
        self._tracker.rollback(step)

    def log_step(self, step: StepMetrics) -> None:
        """Records a step in `metrics.jsonl` and the trackers, and prints a summary every `log_every` steps."""
        if self._file:
            self._history.add(self._file.record(step))
        self._tracker.log(step.as_dict())
        self._advance(step)
        self._recent.append(step)
        if step.step % self._log_every == 0 or step.step == self._total_steps:
            self.log.info(format_steps(self._recent, self._total_steps))
            self._recent.clear()

    def log_validation(self, row: Mapping[str, Any]) -> None:
        """Logs a row of `validation.jsonl`. Rank 0 only."""
        self._history.add_validation(without_nan(row))
        self._tracker.log(row)

    def log_samples(self, step: int, samples: list[dict[str, Any]]) -> None:
        """Logs the generations for the fixed prompts: rows with `prompt` and `text`. Rank 0 only."""
        self._tracker.log_samples(step, samples)

    def log_checkpoint(self, step: int, stall: float) -> None:
        """Logs that a checkpoint is being written; `stall`: seconds for which the copy blocked training."""
        self.log.info(f"checkpoint of step {step}: training waited {stall:.2f} s")
        if self._file:
            # A checkpoint survives a crash of the host, so the metrics of the steps before it must be on disk too.
            self._warn_on_failure(layout.METRICS, self._file.sync)
        if self._file and (self._pending_plot is None or self._pending_plot.done()):
            self._pending_plot = self._plot_executor.submit(self._warn_on_failure, _HISTORY_FILES, self._history.save)

    def _warn_on_failure(self, files: str, write: Callable[[], None]) -> None:
        try:
            write()
        except Exception as error:  # a failed plot must neither end a run nor replace its exception
            self.log.warning(f"{self._run_dir}: {files} was not written ({str(error) or type(error).__name__})")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.close()
            if self._file:
                self._warn_on_failure(_HISTORY_FILES, self._history.save)
                self._warn_on_failure(layout.METRICS, self._file.close)
        finally:
            self._tracker.finish(0 if error is None else EXIT_FAILED)
