"""Asynchronous checkpoints: complete or absent, written while training continues; restoring skips damaged ones."""

import json
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist

from fireflyds.checkpoint import shard_files
from fireflyds.checkpoint.restore import restore_latest
from fireflyds.checkpoint.retention import checkpoints_to_delete, read_checkpoint_info
from fireflyds.checkpoint.shard_files import FORMAT_VERSION, MANIFEST
from fireflyds.checkpoint.storage import CheckpointStorage, step_of
from fireflyds.config import CheckpointConfig
from fireflyds.distributed.collectives import run_on_rank_zero
from fireflyds.errors import UserError, describe
from fireflyds.fs import atomic_write_text
from fireflyds.runs import layout
from fireflyds.types import StepMetrics, TrainState
from fireflyds.zero import partitions
from fireflyds.zero.engine import Engine
from fireflyds.zero.partitions import FlatPartition

# Seconds that a run which ends with an error waits for the checkpoint that is being written.
_EXIT_WAIT_SECONDS = 60.0


class TrainableWeightsSink(Protocol):
    """Adds metadata of the trained weights to a checkpoint on rank 0; raises `UserError` if these are incomplete."""

    def write(self, folder: Path, step: int, skipped: int) -> None:
        """Writes the metadata to `folder`. `skipped`: number of optimizer steps skipped before step `step`."""


class CheckpointManager:
    """Saves checkpoints of a run. Training waits only for the copy to host memory; a thread writes it to disk.

    A context manager: it waits for the checkpoint being written. All ranks call the same methods in the same order.
    """

    def __init__(
        self, engine: Engine, storage: CheckpointStorage, config: CheckpointConfig, weights_sink: TrainableWeightsSink
    ) -> None:
        self._engine, self._config, self._weights_sink = engine, config, weights_sink
        self._storage = storage
        self._thread: threading.Thread | None = None
        self._written, self._abandoned = threading.Event(), threading.Event()
        self._failure: BaseException | None = None
        # Skipped on restoring: they do not count as kept when old checkpoints are deleted.
        self._corrupted: set[str] = set()
        run_on_rank_zero(self._remove_leftovers)
        self._require_space()

    def __enter__(self) -> "CheckpointManager":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None:
            self.wait()
        elif self._thread is not None and issubclass(kind, UserError):
            # All ranks end for the same reason, so the checkpoint being written can be completed.
            self._thread.join(_EXIT_WAIT_SECONDS)
        self._abandoned.set()

    @property
    def failed(self) -> bool:
        """True if this rank could not write its shard of the newest checkpoint; `StopSignals.poll` combines all."""
        return self._failure is not None

    def restore_latest(self, warn: Callable[[str], None]) -> TrainState:
        """Restores the newest undamaged checkpoint (see `restore.restore_latest`) and records the corrupted ones."""
        return restore_latest(self._engine, self._storage, warn, self._corrupted)

    def save(self, state: TrainState, metrics: StepMetrics) -> float:
        """Save this step. Returns the seconds that training waited.

        Raises:
            UserError: the previous checkpoint could not be saved, or the disk has too little space for this one.
        """
        started = time.perf_counter()
        self.wait()
        self._require_space()
        name = layout.step_name(state.step)
        run_on_rank_zero(lambda: self._storage.begin(name))
        copies = shard_files.stage_to_cpu(partitions.owned_partitions(self._engine))
        manifest = {
            "version": FORMAT_VERSION,
            "train_state": state.as_dict(),
            "skipped_steps": self._engine.skipped_steps,
            "layout": partitions.partition_layout(self._engine),
            "scaler": partitions.loss_scaler_state(self._engine),
            "parameters": partitions.param_shapes(self._engine),
            "metrics": metrics.as_dict(),
        }
        thread = threading.Thread(
            target=self._write_in_background, args=(name, copies, manifest), name="checkpoint", daemon=True
        )
        self._written.clear()
        self._thread = thread
        thread.start()
        if not self._config.background:
            self.wait()
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the newest checkpoint is complete.

        Raises:
            UserError: a rank could not write its shard; the previous checkpoint is intact.
        """
        if self._thread is None:
            return
        if dist.get_rank():
            self._thread.join()
        else:
            self._written.wait()
        self._raise_failures()
        self._thread.join()
        self._raise_failures()
        self._thread = None

    def _raise_failures(self) -> None:
        failures: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(failures, None if self._failure is None else describe(self._failure))
        if messages := [f"rank {rank}: {text}" for rank, text in enumerate(failures) if text]:
            self._abandoned.set()
            raise UserError(
                f"the newest checkpoint was not saved ({messages[0]}). The previous one is intact",
                key=self._storage.location,
                remedy="Correct the cause, and run the same command again",
            ) from self._failure

    def _write_in_background(self, name: str, copies: dict[str, Any], manifest: dict[str, Any]) -> None:
        try:
            try:
                shard_files.write_shard(self._storage.staging(name), dist.get_rank(), copies)
                copies.clear()
            finally:
                self._written.set()
            if dist.get_rank() == 0:
                self._complete(name, manifest)
        except BaseException as error:
            self._failure = error

    def _complete(self, name: str, manifest: dict[str, Any]) -> None:
        """On rank 0, once all ranks have written: add metadata and checksums, commit, and delete old checkpoints."""
        world_size, staging = manifest["layout"]["world_size"], self._storage.staging(name)
        while len(list(staging.glob("rank-*.json"))) < world_size:
            if self._abandoned.wait(0.02):
                return
        atomic_write_text(staging / MANIFEST, json.dumps(manifest, indent=2))
        step = manifest["train_state"]["step"]
        self._weights_sink.write(staging, step, manifest["skipped_steps"])
        shard_files.write_checksums(staging)
        self._storage.commit(name)
        self._corrupted.discard(name)
        try:
            self._prune(step)
        except OSError as error:  # the new checkpoint is complete nevertheless
            print(
                f"warning: {self._storage.location}: old checkpoints were not removed ({error})",
                file=sys.stderr,
                flush=True,
            )

    def _prune(self, saved: int) -> None:
        """Delete the checkpoints that are not to be kept after step `saved`.

        Checkpoints of later steps were skipped on restoring: they are neither deleted nor counted until the run has
        passed their step.
        """
        names = [name for name in self._storage.list() if step_of(name) <= saved]
        undamaged = [
            read_checkpoint_info(self._storage.open(name), step_of(name), self._config.best_metric)
            for name in names
            if name not in self._corrupted
        ]
        damaged = [name for name in names if name in self._corrupted]
        for name in [*damaged, *map(layout.step_name, checkpoints_to_delete(undamaged, self._config))]:
            self._storage.remove(name)
            self._corrupted.discard(name)

    def _remove_leftovers(self) -> None:
        """Remove the incomplete checkpoints of a killed process."""
        try:
            self._storage.remove_leftovers()
        except OSError as error:
            raise UserError(
                f"cannot be written ({error.strerror})", key=self._storage.location, remedy="Give another runs="
            ) from error

    def _require_space(self) -> None:
        """Raises `UserError` if the disk has too little space, before training a step that could not be saved."""
        num_bytes = sum(_partition_bytes(partition) for _, partition in partitions.owned_partitions(self._engine))
        sizes: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(sizes, num_bytes)
        run_on_rank_zero(lambda: _require_free_space(self._storage, sum(sizes)))


def _partition_bytes(partition: FlatPartition) -> int:
    """Bytes of a partition in a shard file. Before the first step there are no states yet: two moments are assumed."""
    length = sum(param_slice.length for param_slice in partition.slices)
    states = [value for value in partition.state.values() if hasattr(value, "numel") and value.numel() > 1]
    return length * 4 + (sum(value.numel() * value.element_size() for value in states) if states else length * 8)


def _require_free_space(storage: CheckpointStorage, needed: int) -> None:
    free = storage.free_bytes()
    if free < needed * 1.1:
        raise UserError(
            f"a checkpoint takes {needed / 2**30:.2f} GiB and the disk has {free / 2**30:.2f} GiB free. Earlier "
            "checkpoints are intact",
            key=storage.location,
            remedy="Free space, lower checkpoint.keep or set checkpoint.max_gib, then run the same command again",
        )
