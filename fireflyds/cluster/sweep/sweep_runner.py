"""Runs a sweep: samples, starts, monitors, prunes and records trials; a killed sweep is resumed."""

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import FrameType

from optuna.trial import FrozenTrial

from fireflyds.cluster import slurm, watch
from fireflyds.cluster.launchers import Launcher
from fireflyds.cluster.sweep.ranges import Value
from fireflyds.cluster.sweep.study import COMPLETE, FAIL, PRUNED, RUNNING, Study, trial_name
from fireflyds.config import SearchConfig
from fireflyds.errors import UserError
from fireflyds.fs import atomic_write_text, lock_file
from fireflyds.runs import layout

# Seconds that a pruned trial has to finish its step and save before it is killed.
_STOP_TIMEOUT_SECONDS = 300.0
# Composes the configuration of a trial: (run name, parameters) -> YAML text.
Freeze = Callable[[str, Mapping[str, Value]], str]


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Holds the lock of a study, so that no second process works on it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        remedy = "Wait for it, or end it"
        busy = UserError("another process works on this study now", key=folder, remedy=remedy)
        lock = lock_file(folder / ".lock", busy)
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})", key=folder, remedy="Give another study= or runs="
        ) from error
    with lock:
        yield


def run_name(study: str, number: int) -> str:
    """Returns the name of a trial's run."""
    return f"{study}/{trial_name(number)}"


class Sweep:
    """Runs a study, in one process at a time; trials are separate processes or jobs that outlive it.

    A trial is sampled (an entry in the study's journal), frozen (`config.yaml` in its run's folder), started, monitored
    and recorded. After a kill between any two of these the sweep resumes from the files: a trial without an outcome is
    started, or restarted, unless a process or job of it is active.
    """

    def __init__(
        self, study: Study, search: SearchConfig, name: str, folder: Path, freeze: Freeze, launcher: Launcher
    ) -> None:
        self._study, self._search, self._name, self._folder = study, search, name, folder
        self._freeze, self._launcher = freeze, launcher
        self._stop_requested_at: dict[int, float] = {}
        self._slots: dict[int, int] = {}
        self._interrupted: set[int] = set()
        self.stopping = False
        self._last_error = ""

    def run(self) -> bool:
        """Runs until every trial has ended. Returns False if it was interrupted."""
        previous = {number: signal.signal(number, self.handle_signal) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while (finished := self._advance_all()) is None:
                time.sleep(self._search.poll_seconds)
            return finished
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _advance_all(self) -> bool | None:
        """Advances every trial once. Returns True when all have ended, False when interrupted, None otherwise."""
        try:
            for trial in self._running():
                self._advance(trial)
            while not self.stopping and len(self._running()) < self._search.parallel and self._num_remaining():
                self._advance(self._study.ask())
            if not self._running() and not self._num_remaining():
                return True
            if self.stopping and not self._interrupt():
                return False
            self._last_error = ""
        except slurm.UnavailableError as error:
            # Expected now and then during a study of days; the jobs keep running meanwhile.
            if self.stopping or not any(trial.user_attrs.get("starts") for trial in self._running()):
                raise
            if str(error) != self._last_error:
                self._last_error = str(error)
                print(f"{self._last_error}. Retrying until Slurm responds", flush=True)
        return None

    def _interrupt(self) -> bool:
        """Asks each trial once to save and exit (a second SIGTERM would kill it). True while an asked one is active."""
        active = self._active()
        for trial in active:
            if trial.number not in self._interrupted and self._launcher.stop(self._run_dir(trial)):
                self._interrupted.add(trial.number)
        return any(trial.number in self._interrupted for trial in active)

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: the first signal interrupts the sweep, the second raises `KeyboardInterrupt`."""
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        print(
            "stopping: local trials save and exit, Slurm jobs keep running; the same command resumes the study "
            "(again: exit at once)",
            flush=True,
        )

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self._study.trials if trial.state is RUNNING]

    def _active(self) -> list[FrozenTrial]:
        return [trial for trial in self._running() if self._launcher.is_running(self._run_dir(trial))]

    def _num_remaining(self) -> int:
        return self._study.wanted - len(self._study.trials)

    def _run_dir(self, trial: FrozenTrial) -> Path:
        return self._folder / trial_name(trial.number)

    def _advance(self, trial: FrozenTrial) -> None:
        """Advances a trial: freezes, starts, monitors or records it, depending on its state."""
        run_dir = self._run_dir(trial)
        if not (run_dir / layout.CONFIG).exists():
            try:
                config_text = self._freeze(run_name(self._name, trial.number), trial.params)
            except UserError as error:  # only the ends of each range were validated, one key at a time
                self._record(trial, watch.RunOutcome(layout.FAILED, str(error)))
                return
            run_dir.mkdir(parents=True, exist_ok=True)
            atomic_write_text(run_dir / layout.CONFIG, config_text)
        if self._launcher.is_running(run_dir):
            self._slot(trial)
            self._monitor(trial)
            return
        self._study.report(trial.number, watch.pruner_reports(run_dir, self._search))
        run_outcome = watch.run_outcome(run_dir)
        if run_outcome.state in (watch.LOST, watch.INTERRUPTED) and trial.user_attrs.get("pruned"):
            run_outcome = watch.RunOutcome(layout.STOPPED, "exited after a stop request")
        any_trained = any(watch.training_totals(self._run_dir(other))[0] for other in self._study.trials)
        if run_outcome.state == layout.FAILED and not any_trained and trial.user_attrs.get("starts", 0) <= 1:
            # The cause may affect all trials. At the second failed start it is attributed to the trial's own values.
            for other in self._running():
                watch.archive_output(self._run_dir(other))
            raise UserError(
                f"trial {trial.number} ended before its first step: {run_outcome.message}",
                remedy="Fix the cause; the same command resumes the study",
            )
        if run_outcome.state not in (watch.LOST, watch.INTERRUPTED):
            self._record(trial, run_outcome)
        elif not self.stopping:
            self._start(trial, run_outcome)

    def _slot(self, trial: FrozenTrial) -> int:
        """Returns the index of the trial among concurrent trials; it is kept over restarts of the sweep."""
        if trial.number not in self._slots:
            running = {other.number for other in self._running()} - {trial.number}
            used = {self._slots[number] for number in running if number in self._slots}
            used |= {
                other.user_attrs["slot"]
                for other in self._running()
                if other.number in running and "slot" in other.user_attrs
            }
            stored = trial.user_attrs.get("slot")
            free = next(index for index in range(len(used) + 1) if index not in used)
            self._slots[trial.number] = free if stored is None or stored >= self._search.parallel else stored
        return self._slots[trial.number]

    def _start(self, trial: FrozenTrial, run_outcome: watch.RunOutcome) -> None:
        starts, previous_deaths = trial.user_attrs.get("starts", 0), trial.user_attrs.get("deaths", 0)
        deaths = previous_deaths + (starts > 0 and run_outcome.state == watch.LOST)
        if deaths > self._search.retries:
            message = f"its processes died {deaths} times, at last with: {run_outcome.message}"
            self._record(trial, watch.RunOutcome(layout.FAILED, message))
            return
        params_text = ", ".join(f"{key}={value}" for key, value in trial.params.items())
        print(f"trial {trial.number}: {'starts' if not starts else 'starts again'} with {params_text}", flush=True)
        slot = self._slot(trial)
        self._study.set_attrs(trial.number, starts=starts + 1, deaths=deaths, slot=slot)
        try:
            self._launcher.start(self._run_dir(trial), slot)
        except UserError:
            # A full queue does not count as a failure of the trial.
            self._study.set_attrs(trial.number, starts=starts, deaths=previous_deaths)
            raise

    def _monitor(self, trial: FrozenTrial) -> None:
        run_dir = self._run_dir(trial)
        self._study.report(trial.number, watch.pruner_reports(run_dir, self._search))
        if trial.number in self._stop_requested_at:
            if time.monotonic() - self._stop_requested_at[trial.number] > _STOP_TIMEOUT_SECONDS:
                self._launcher.kill(run_dir)
        elif trial.user_attrs.get("pruned") or self._study.should_prune(trial.number):
            if not trial.user_attrs.get("pruned"):
                step, value, _ = watch.metric_history(run_dir, self._search.metric)[-1]
                print(f"trial {trial.number}: pruned at step {step} ({self._search.metric} {value:.4f})", flush=True)
                self._study.set_attrs(trial.number, pruned=True)
            (run_dir / layout.STOP_FILE).touch()
            self._stop_requested_at[trial.number] = time.monotonic()

    def _record(self, trial: FrozenTrial, run_outcome: watch.RunOutcome) -> None:
        run_dir = self._run_dir(trial)
        value = watch.objective_value(run_dir, self._search)
        steps, tokens, seconds = watch.training_totals(run_dir)
        state, outcome, message = FAIL, run_outcome.state, run_outcome.message
        if run_outcome.state == layout.STOPPED:
            state, outcome = PRUNED, "pruned" if trial.user_attrs.get("pruned") else "stopped by hand"
        elif run_outcome.state == layout.FINISHED and value is None:
            outcome = layout.FAILED
            message = (
                f"sweep.metric={self._search.metric} was not measured as asked. There is: "
                f"{', '.join(watch.metric_names(run_dir))}"
            )
        elif run_outcome.state == layout.FINISHED and not math.isfinite(value or 0.0):
            outcome, message = watch.DIVERGED, f"{self._search.metric} is not finite"
        elif run_outcome.state == layout.FINISHED:
            state = COMPLETE
        attributes = {
            "outcome": outcome,
            "message": message,
            "steps": steps,
            "tokens": tokens,
            "seconds": round(seconds, 1),
        }
        final_value = value if value is not None and math.isfinite(value) else None
        self._study.tell(trial.number, state, final_value, last_value=final_value, **attributes)
        (run_dir / layout.STOP_FILE).unlink(missing_ok=True)
        summary = f"{self._search.metric} {final_value:.5f}" if final_value is not None else message
        print(f"trial {trial.number}: {outcome} after {steps} steps, {summary}", flush=True)
        if run_outcome.state == layout.FINISHED and value is None and self._study.best is None:
            raise UserError(
                f"trial {trial.number}: {message}", remedy="Give another study= and one of these, or measure it"
            )
