"""A sweep: trials are drawn, started, watched, pruned and recorded; a sweep that was killed goes on where it was."""

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
from fireflyds.cluster.sweep import study as study_of
from fireflyds.cluster.sweep.ranges import Value
from fireflyds.cluster.sweep.study import Study
from fireflyds.config import SearchConfig
from fireflyds.errors import UserError
from fireflyds.fs import atomic_write_text, lock_file

# A trial that was asked to stop finishes its step and saves first.
_PATIENCE = 300.0
Freeze = Callable[[str, Mapping[str, Value]], str]


@contextlib.contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Keep a second process out of a study."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = lock_file(folder / ".lock", f"{folder}: another process works on this study now. Wait for it, or end it")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror}). Give another study= or runs=") from error
    with lock:
        yield


def run_name(study: str, number: int) -> str:
    return f"{study}/trial-{number:04d}"


class Sweep:
    """One process at a time works on a study; trials are processes or jobs of their own and outlive it.

    A trial is drawn (a row in the study's file), frozen (`config.yaml` in its run's folder), started, watched, recorded. A
    kill between any two of these is seen from what is there: a trial without an outcome is looked for, and started, or
    started again, when nothing runs it.
    """

    def __init__(
        self, study: Study, search: SearchConfig, name: str, folder: Path, freeze: Freeze, launcher: Launcher
    ) -> None:
        self._study, self._search, self._name, self._folder = study, search, name, folder
        self._freeze, self._launcher = freeze, launcher
        self._asked: dict[int, float] = {}
        self._slots: dict[int, int] = {}
        self._interrupted: set[int] = set()
        self._leaving = False
        self._trouble = ""

    def run(self) -> bool:
        """Work until every trial has ended. False where it was interrupted."""
        previous = {number: signal.signal(number, self._hear) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            while (finished := self._round()) is None:
                time.sleep(self._search.poll_seconds)
            return finished
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def _round(self) -> bool | None:
        """A look at every trial. Whether all have ended, at the end; None while there is more to do."""
        try:
            for trial in self._running():
                self._look(trial)
            while not self._leaving and len(self._running()) < self._search.parallel and self._left():
                self._look(self._study.ask())
            if not self._running() and not self._left():
                return True
            if self._leaving and not self._interrupt():
                return False
            self._trouble = ""
        except slurm.UnavailableError as error:
            # In days of a study that happens; the jobs go on meanwhile.
            if self._leaving or not any(trial.user_attrs.get("starts") for trial in self._running()):
                raise
            if str(error) != self._trouble:
                self._trouble = str(error)
                print(f"{self._trouble}. Tried again until it goes", flush=True)
        return None

    def _interrupt(self) -> bool:
        """Ask all that can to save and leave, each once: a second SIGTERM means at once. Whether any still works on it."""
        alive = self._alive()
        for trial in alive:
            if trial.number not in self._interrupted and self._launcher.stop(self._place(trial)):
                self._interrupted.add(trial.number)
        return any(trial.number in self._interrupted for trial in alive)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self._leaving:
            raise KeyboardInterrupt
        self._leaving = True
        print(
            "stopping: trials on this machine save and leave, jobs go on; the same command goes on with all (again: leave at once)",
            flush=True,
        )

    def _running(self) -> list[FrozenTrial]:
        return [trial for trial in self._study.trials if trial.state is study_of.RUNNING]

    def _alive(self) -> list[FrozenTrial]:
        return [trial for trial in self._running() if self._launcher.is_running(self._place(trial))]

    def _left(self) -> int:
        return self._study.wanted - len(self._study.trials)

    def _place(self, trial: FrozenTrial) -> Path:
        return self._folder / f"trial-{trial.number:04d}"

    def _look(self, trial: FrozenTrial) -> None:
        """One look at one trial, whatever became of it."""
        place = self._place(trial)
        if not (place / "config.yaml").exists():
            try:
                text = self._freeze(run_name(self._name, trial.number), trial.params)
            except UserError as error:  # the ends of each range were tried, not all between, nor with those of others
                self._record(trial, watch.RunOutcome("failed", str(error)))
                return
            place.mkdir(parents=True, exist_ok=True)
            atomic_write_text(place / "config.yaml", text)
        if self._launcher.is_running(place):
            self._slot(trial)
            self._watch(trial)
            return
        self._study.report(trial.number, watch.pruner_reports(place, self._search))
        ended = watch.run_outcome(place)
        if ended.state in ("lost", "interrupted") and trial.user_attrs.get("pruned"):
            ended = watch.RunOutcome("stopped", "ended while it was asked to stop")
        trained = any(watch.training_totals(self._place(each))[0] for each in self._study.trials)
        if ended.state == "failed" and not trained and trial.user_attrs.get("starts", 0) <= 1:
            # What keeps the first from beginning may keep all of them. Twice: its own values do.
            for each in self._running():
                watch.archive_output(self._place(each))
            raise UserError(
                f"trial {trial.number} ended before its first step: {ended.message}. Mend it; the same command goes on"
            )
        if ended.state not in ("lost", "interrupted"):
            self._record(trial, ended)
        elif not self._leaving:
            self._start(trial, ended)

    def _slot(self, trial: FrozenTrial) -> int:
        """The trial's place among those that run at the same time; it keeps it over restarts of the sweep."""
        if trial.number not in self._slots:
            running = {each.number for each in self._running()} - {trial.number}
            taken = {self._slots[number] for number in running if number in self._slots}
            taken |= {
                each.user_attrs["slot"]
                for each in self._running()
                if each.number in running and "slot" in each.user_attrs
            }
            noted = trial.user_attrs.get("slot")
            free = next(place for place in range(len(taken) + 1) if place not in taken)
            self._slots[trial.number] = free if noted is None or noted >= self._search.parallel else noted
        return self._slots[trial.number]

    def _start(self, trial: FrozenTrial, ended: watch.RunOutcome) -> None:
        starts, before = trial.user_attrs.get("starts", 0), trial.user_attrs.get("deaths", 0)
        deaths = before + (starts > 0 and ended.state == "lost")
        if deaths > self._search.retries:
            why = f"its processes died {deaths} times, at last with: {ended.message}"
            self._record(trial, watch.RunOutcome("failed", why))
            return
        shown = ", ".join(f"{key}={value}" for key, value in trial.params.items())
        print(f"trial {trial.number}: {'starts' if not starts else 'starts again'} with {shown}", flush=True)
        slot = self._slot(trial)
        self._study.set_attrs(trial.number, starts=starts + 1, deaths=deaths, slot=slot)
        try:
            self._launcher.start(self._place(trial), slot)
        except UserError:
            # A queue that takes no more is no fault of the trial's.
            self._study.set_attrs(trial.number, starts=starts, deaths=before)
            raise

    def _watch(self, trial: FrozenTrial) -> None:
        place = self._place(trial)
        self._study.report(trial.number, watch.pruner_reports(place, self._search))
        if trial.number in self._asked:
            if time.monotonic() - self._asked[trial.number] > _PATIENCE:
                self._launcher.kill(place)
        elif trial.user_attrs.get("pruned") or self._study.should_prune(trial.number):
            if not trial.user_attrs.get("pruned"):
                step, value, _ = watch.metric_history(place, self._search.metric)[-1]
                print(f"trial {trial.number}: pruned at step {step} ({self._search.metric} {value:.4f})", flush=True)
                self._study.set_attrs(trial.number, pruned=True)
            (place / watch.STOP).touch()
            self._asked[trial.number] = time.monotonic()

    def _record(self, trial: FrozenTrial, ended: watch.RunOutcome) -> None:
        place = self._place(trial)
        value = watch.objective_value(place, self._search)
        steps, tokens, seconds = watch.training_totals(place)
        state, outcome, why = study_of.FAIL, ended.state, ended.message
        if ended.state == "stopped":
            state, outcome = study_of.PRUNED, "pruned" if trial.user_attrs.get("pruned") else "stopped by hand"
        elif ended.state == "finished" and value is None:
            outcome = "failed"
            why = f"sweep.metric={self._search.metric} was not measured as asked. There is: {', '.join(watch.metric_names(place))}"
        elif ended.state == "finished" and not math.isfinite(value or 0.0):
            outcome, why = "diverged", f"{self._search.metric} is no finite number"
        elif ended.state == "finished":
            state = study_of.COMPLETE
        facts = {"outcome": outcome, "message": why, "steps": steps, "tokens": tokens, "seconds": round(seconds, 1)}
        last = value if value is not None and math.isfinite(value) else None
        self._study.tell(trial.number, state, last, last_value=last, **facts)
        (place / watch.STOP).unlink(missing_ok=True)
        shown = f"{self._search.metric} {last:.5f}" if last is not None else why
        print(f"trial {trial.number}: {outcome} after {steps} steps, {shown}", flush=True)
        if ended.state == "finished" and value is None and self._study.best is None:
            raise UserError(f"trial {trial.number}: {why}. Give another study= and one of these, or measure it")
