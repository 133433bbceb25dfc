"""Every step of a run, told to all who listen: `metrics.jsonl`, the tracker, the progress bar, the log; at every save
`trainer_state.json` and `loss.png`."""

import contextlib
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

from fireflyds.engine.history import History
from fireflyds.engine.metrics import MetricsFile, finite, line, read_metrics
from fireflyds.engine.progress import progress
from fireflyds.engine.status import EXIT_FAILED
from fireflyds.engine.trackers import Tracker
from fireflyds.types import StepMetrics


class Journal:
    """Used as a context. Files and bar are rank 0's; other ranks only log to their own file."""

    def __init__(
        self,
        run_dir: Path,
        tracker: Tracker,
        log: logging.Logger,
        rank: int,
        done: int,
        total_steps: int,
        log_every: int,
        steps_per_epoch: float,
    ) -> None:
        self._run_dir, self._tracker, self.log = run_dir, tracker, log
        self._total_steps, self._log_every, self._steps_per_epoch = total_steps, log_every, steps_per_epoch
        self._recent: list[StepMetrics] = []
        self._file: MetricsFile | None = None
        self._painted: Future[None] | None = None
        self._stack = contextlib.ExitStack()
        try:
            if rank == 0:
                self._open(done)
            # A picture takes longer than a step.
            self._painter = self._stack.enter_context(ThreadPoolExecutor(1, "journal"))
            self._advance = self._stack.enter_context(progress(total_steps, done, rank == 0))
        except BaseException:
            # The tracker was opened for this object, which nobody can leave now.
            self._stack.close()
            tracker.finish(EXIT_FAILED)
            raise

    def __enter__(self) -> "Journal":
        return self

    def _open(self, done: int) -> None:
        self._file = MetricsFile(self._run_dir, done)
        self._history = History(self._run_dir, self._total_steps, self._log_every, self._steps_per_epoch)
        for row in self._file.kept:
            self._history.add(row)
        for row in read_metrics(self._run_dir / "validation.jsonl"):
            if row["step"] <= done:
                self._history.add_validation(row)

    def go_back(self, done: int) -> None:
        """Forget the steps behind a checkpoint that the run went back to."""
        self._recent.clear()
        if self._file:
            self._file.close()
            self._open(done)
        self._tracker.go_back(done)

    def record(self, step: StepMetrics) -> None:
        if self._file:
            self._history.add(self._file.record(step))
        self._tracker.log(step.as_dict())
        self._advance(step)
        self._recent.append(step)
        if step.step % self._log_every == 0 or step.step == self._total_steps:
            self.log.info(line(self._recent, self._total_steps))
            self._recent.clear()

    def validated(self, row: Mapping[str, Any]) -> None:
        """A row of `validation.jsonl`, on rank 0."""
        self._history.add_validation(finite(row))
        self._tracker.log(row)

    def sampled(self, step: int, samples: list[dict[str, Any]]) -> None:
        """What the model wrote to the fixed prompts: rows with `prompt` and `text`, on rank 0."""
        self._tracker.samples(step, samples)

    def saved(self, step: int, stall: float) -> None:
        """A checkpoint is being written; training waited `stall` seconds for the copy."""
        self.log.info(f"checkpoint of step {step}: training waited {stall:.2f} s")
        if self._file:
            # A checkpoint outlives a crash of the machine, and so must the steps before it.
            self._attempt("metrics.jsonl", self._file.sync)
        if self._file and (self._painted is None or self._painted.done()):
            self._painted = self._painter.submit(self._attempt, "trainer_state.json or loss.png", self._history.save)

    def _attempt(self, what: str, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # a picture is no reason to end a run, nor to hide why it ends
            self.log.warning(f"{self._run_dir}: {what} was not written ({str(error) or type(error).__name__})")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._stack.close()
            if self._file:
                self._attempt("trainer_state.json or loss.png", self._history.save)
                self._attempt("metrics.jsonl", self._file.close)
        finally:
            self._tracker.finish(0 if error is None else EXIT_FAILED)
