"""Checkpoints: whole or absent, written while training goes on, found again, damaged ones passed over."""

import json
import shutil
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from fireflyds.config import CheckpointConfig
from fireflyds.directories import read_json, sync, write_whole
from fireflyds.engine import fragments, stretches
from fireflyds.engine.deepspeed import on_rank_zero
from fireflyds.engine.fragments import MANIFEST, Fragments
from fireflyds.engine.retention import read_kept, to_drop
from fireflyds.errors import UserError
from fireflyds.types import StepMetrics, TrainState

FOLDER, LATEST = "checkpoints", "latest"
VERSION = 1
# Folders that `load` found damaged and passed over: they count for nothing when old checkpoints are dropped.
_passed_over: set[Path] = set()
# How long a run that ends by an error waits for the checkpoint that is being written.
_LEAVING_SECONDS = 60.0


def step_name(step: int) -> str:
    return f"step-{step:06d}"


class Keeper(Protocol):
    """Adds what was learnt to a checkpoint on rank 0, and refuses what was not saved whole."""

    def keep(self, folder: Path, step: int, skipped: int) -> None: ...


class Saver:
    """Saves checkpoints of a run. Training waits for a copy on the host only; a thread writes it.

    Used as a context: leaving it waits for what is being written. All ranks call the same methods in the same order.
    """

    def __init__(self, engine: Any, run_dir: Path, config: CheckpointConfig, keeper: Keeper) -> None:
        self._engine, self._config, self._keeper = engine, config, keeper
        self._folder = run_dir / FOLDER
        self._thread: threading.Thread | None = None
        self._written, self._abandoned = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        on_rank_zero(self._make_room)
        self._require_space()

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.finish()
        elif self._thread is not None and issubclass(kind, UserError):
            # All ranks leave for the same reason, so what is being written can become whole.
            self._thread.join(_LEAVING_SECONDS)
        self._abandoned.set()

    @property
    def failed(self) -> bool:
        """Whether this rank's share of the newest checkpoint could not be written. Told to all by `finish`."""
        return self._failure is not None

    def begin(self, state: TrainState, metrics: StepMetrics) -> float:
        """Save this step. Returns the seconds that training waited.

        Raises:
            UserError: the one before could not be saved, or the disk has no room for this one.
        """
        started = time.perf_counter()
        self.finish()
        self._require_space()
        aside = self._folder / f".{step_name(state.step)}.partial"
        on_rank_zero(lambda: _fresh(aside))
        copies = fragments.snapshot(stretches.owned(self._engine))
        manifest = {
            "version": VERSION,
            "train_state": state.as_dict(),
            "skipped_steps": self._engine.skipped_steps,
            "layout": stretches.layout(self._engine),
            "scaler": stretches.scaler_state(self._engine),
            "parameters": stretches.shapes(self._engine),
            "metrics": metrics.as_dict(),
        }
        work = threading.Thread(target=self._work, args=(aside, copies, manifest), name="checkpoint", daemon=True)
        self._written.clear()
        self._thread = work
        work.start()
        if not self._config.background:
            self.finish()
        return time.perf_counter() - started

    def finish(self) -> None:
        """Wait until the newest checkpoint is in place.

        Raises:
            UserError: some rank could not write; the checkpoint before is whole.
        """
        if self._thread is None:
            return
        if dist.get_rank():
            self._thread.join()
        else:
            self._written.wait()
        self._agree()
        self._thread.join()
        self._agree()
        self._thread = None

    def _agree(self) -> None:
        failures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, None if self._failure is None else _words(self._failure))
        if said := [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]:
            self._abandoned.set()
            raise UserError(
                f"{self._folder}: the newest checkpoint was not saved ({said[0]}). The one before is whole. Mend that, and "
                "give the same command again"
            ) from self._failure

    def _work(self, aside: Path, copies: dict[str, Any], manifest: dict[str, Any]) -> None:
        try:
            try:
                fragments.write(aside, dist.get_rank(), copies)
                copies.clear()
            finally:
                self._written.set()
            if dist.get_rank() == 0:
                self._complete(aside, manifest)
        except BaseException as error:
            self._failure = error

    def _complete(self, aside: Path, manifest: dict[str, Any]) -> None:
        """On rank 0, when all ranks have written: add what was learnt, seal, rename, forget old ones."""
        world_size = manifest["layout"]["world_size"]
        while len(list(aside.glob("rank-*.json"))) < world_size:
            if self._abandoned.wait(0.02):
                return
        write_whole(aside / MANIFEST, json.dumps(manifest, indent=2))
        step = manifest["train_state"]["step"]
        self._keeper.keep(aside, step, manifest["skipped_steps"])
        fragments.seal(aside)
        whole = self._folder / step_name(step)
        shutil.rmtree(whole, ignore_errors=True)
        aside.rename(whole)
        sync(self._folder)
        write_whole(self._folder / LATEST, whole.name + "\n")
        _passed_over.discard(whole)
        try:
            self._forget(step)
        except OSError as error:  # this checkpoint is whole all the same
            print(f"warning: {self._folder}: old checkpoints were not removed ({error})", file=sys.stderr, flush=True)

    def _forget(self, saved: int) -> None:
        """Drop what is not to be kept now that a step is saved. What stands behind that step was passed over: it stays where
        it is until the run comes by, and pushes nothing out."""
        found = [path for path in whole_checkpoints(self._folder.parent) if _step(path) <= saved]
        kept = [read_kept(path, _step(path), self._config.best_metric) for path in found if path not in _passed_over]
        damaged = [_step(path) for path in found if path in _passed_over]
        for step in [*damaged, *to_drop(kept, self._config)]:
            old = self._folder / step_name(step)
            # Removing takes a while; what is left of a removal that was cut short must not look whole.
            gone = old.with_name(f".{old.name}.dropped")
            old.rename(gone)
            _passed_over.discard(old)
            shutil.rmtree(gone, ignore_errors=True)

    def _make_room(self) -> None:
        """Remove what a killed process left."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            for left in [*self._folder.glob(".*.partial"), *self._folder.glob(".*.dropped")]:
                shutil.rmtree(left) if left.is_dir() else left.unlink()
        except OSError as error:
            raise UserError(f"{self._folder}: cannot be written ({error.strerror}). Give another runs=") from error

    def _require_space(self) -> None:
        """Raises `UserError` while there is time: before the step that would be lost."""
        mine = sum(_bytes(stretch) for _, stretch in stretches.owned(self._engine))
        sizes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sizes, mine)
        on_rank_zero(lambda: _refuse_full(self._folder, sum(sizes)))


def _words(error: BaseException) -> str:
    return str(error) or repr(error)


def _fresh(aside: Path) -> None:
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True)


def _bytes(stretch: fragments.Stretch) -> int:
    """Of a stretch in a file; before the first step there are no states yet, and two moments are reckoned with."""
    length = sum(part.length for part in stretch.parts)
    states = [value for value in stretch.state.values() if hasattr(value, "numel") and value.numel() > 1]
    return length * 4 + (sum(value.numel() * value.element_size() for value in states) if states else length * 8)


def _refuse_full(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed * 1.1:
        raise UserError(
            f"{folder}: a checkpoint takes {needed / 2**30:.2f} GiB and the disk has {free / 2**30:.2f} GiB free. What was saved "
            "before is whole. Free space, lower checkpoint.keep or give checkpoint.max_gib, then give the same command again"
        )


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints by step. One that is being written has another name."""
    found = [path for path in (run_dir / FOLDER).glob("step-*") if path.name[len("step-") :].isdecimal()]
    return sorted(found, key=_step)


def load(engine: Any, run_dir: Path, say: Callable[[str], None]) -> TrainState:
    """Restore the newest undamaged checkpoint into the engine; the start of a run when there is none.

    It may have been written by any number of ranks and at any ZeRO stage.

    Raises:
        UserError: there are checkpoints, and none of them is undamaged or of this run.
    """
    # Rank 0's list: a network file system may show it to others a little later.
    names = [[path.name for path in whole_checkpoints(run_dir)]]
    dist.broadcast_object_list(names)
    found = [run_dir / FOLDER / name for name in names[0]]
    for folder in reversed(found):
        verdicts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(verdicts, fragments.damage(folder, dist.get_rank(), dist.get_world_size()))
        if wrong := next(filter(None, verdicts), None):
            say(f"{folder} is damaged ({wrong}); the one before is used")
            _passed_over.add(folder)
            continue
        _passed_over.discard(folder)
        return _restore(engine, folder, say)
    if found:
        raise UserError(
            f"{run_dir / FOLDER}: all {len(found)} checkpoints are damaged. Restore one from a backup, or remove the folder to "
            "start the run anew"
        )
    return TrainState()


def _restore(engine: Any, folder: Path, say: Callable[[str], None]) -> TrainState:
    manifest = read_json(folder / MANIFEST)
    if manifest["version"] != VERSION:
        raise UserError(
            f"{folder}: version {manifest['version']}, this code reads {VERSION}. Use the code that wrote it"
        )
    stretches.fill(engine, Fragments(folder), manifest["scaler"])
    state = TrainState(**manifest["train_state"])
    engine.global_steps, engine.skipped_steps = state.step, manifest["skipped_steps"]
    was, now = manifest["layout"], stretches.layout(engine)
    if was != now:
        say(
            f"{folder.name} was written by {was['world_size']} ranks at ZeRO-{was['stage']}; divided anew for "
            f"{now['world_size']} at ZeRO-{now['stage']}"
        )
    return state


def find(run_dir: Path, step: int | None) -> Path:
    """The checkpoint of a step, or the newest that is undamaged.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    found = whole_checkpoints(run_dir)
    if not found:
        raise UserError(f"run: {run_dir} has no checkpoint. Train it first, or check the name")
    wanted = found[::-1] if step is None else [run_dir / FOLDER / step_name(step)]
    names = ", ".join(path.name for path in found)
    if step is not None and wanted[0] not in found:
        raise UserError(f"step={step}: {run_dir} has no such checkpoint. It has: {names}")
    for folder in wanted:
        wrong = fragments.damage(folder)
        if wrong is None:
            return folder
        print(f"{folder} is damaged ({wrong}){'; the one before is used' if step is None else ''}", flush=True)
    raise UserError(
        f"{wanted[0]}: is damaged, and no other fits. The run has: {names}. Give another step=, or train it again from there"
    )
