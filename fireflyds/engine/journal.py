"""Every step of a run, told to all who listen: `metrics.jsonl`, the tracker, the progress bar, the log, `loss.png`."""

import contextlib
import logging
from pathlib import Path
from types import TracebackType

from fireflyds.engine.metrics import MetricsFile, line, plot_loss, read_metrics
from fireflyds.engine.progress import progress
from fireflyds.engine.trackers import NoTracker, WandbTracker
from fireflyds.types import StepMetrics


class Journal:
    """Used as a context. Files and bar are rank 0's; other ranks only log to their own file."""

    def __init__(
        self,
        run_dir: Path,
        tracker: NoTracker | WandbTracker,
        log: logging.Logger,
        rank: int,
        done: int,
        total_steps: int,
        log_every: int,
    ) -> None:
        self._run_dir, self._tracker, self._log = run_dir, tracker, log
        self._total_steps, self._log_every = total_steps, log_every
        self._file = MetricsFile(run_dir, done) if rank == 0 else None
        self._recent: list[StepMetrics] = []
        self._stack = contextlib.ExitStack()
        self._advance = self._stack.enter_context(progress(total_steps, done, rank == 0))

    def __enter__(self) -> "Journal":
        return self

    def go_back(self, done: int) -> None:
        """Forget the steps behind a checkpoint that the run went back to."""
        self._recent.clear()
        if self._file:
            self._file.close()
            self._file = MetricsFile(self._run_dir, done)

    def record(self, step: StepMetrics) -> None:
        if self._file:
            self._file.write(step)
        self._tracker.log(step)
        self._advance(step)
        self._recent.append(step)
        if step.step % self._log_every == 0 or step.step == self._total_steps:
            self._log.info(line(self._recent, self._total_steps))
            self._recent.clear()

    def saved(self, step: int, stall: float) -> None:
        """A checkpoint is being written; training waited `stall` seconds for the copy."""
        self._log.info(f"checkpoint of step {step}: training waited {stall:.2f} s")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        if self._file:
            self._file.close()
            rows = list(read_metrics(self._run_dir / "metrics.jsonl"))
            if rows:
                plot_loss({self._run_dir.name: rows}, self._run_dir / "loss.png")
        self._tracker.finish()
