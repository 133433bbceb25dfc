"""Selects the newest undamaged checkpoint, and restores it into the engine on any number of ranks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fireflyds.checkpoint.shard_files import FORMAT_VERSION, MANIFEST, ShardReader, find_corruption
from fireflyds.checkpoint.storage import CheckpointStorage, storage_of
from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.runs import layout
from fireflyds.types import TrainState
from fireflyds.zero import partitions
from fireflyds.zero.engine import Engine


def restore_latest(
    engine: Engine, storage: CheckpointStorage, warn: Callable[[str], None], corrupted: set[str] | None = None
) -> TrainState:
    """Restore the newest undamaged checkpoint into the engine. Returns its state; the initial state if there is none.

    It may have been written by any number of ranks and at any ZeRO stage. Damaged ones are logged with `warn` and added
    to `corrupted`.

    Raises:
        UserError: all checkpoints are damaged, or the checkpoint belongs to another run.
    """
    corrupted = set() if corrupted is None else corrupted
    # The list of rank 0: network file systems may show new folders to other ranks a little later.
    listed = [storage.list()]
    dist.broadcast_object_list(listed)
    for name in reversed(listed[0]):
        folder = storage.open(name)
        verdicts: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(verdicts, find_corruption(folder, dist.get_rank(), dist.get_world_size()))
        if problem := next(filter(None, verdicts), None):
            warn(f"{folder} is damaged ({problem}); the previous checkpoint is used")
            corrupted.add(name)
            continue
        corrupted.discard(name)
        return _restore_from(engine, folder, warn)
    if listed[0]:
        raise UserError(
            f"all {len(listed[0])} checkpoints are damaged",
            key=storage.location,
            remedy="Restore one from a backup, or remove the folder to start the run from the beginning",
        )
    return TrainState()


def _restore_from(engine: Engine, folder: Path, warn: Callable[[str], None]) -> TrainState:
    manifest = read_json(folder / MANIFEST)
    if manifest["version"] != FORMAT_VERSION:
        raise UserError(
            f"version {manifest['version']}, this code reads {FORMAT_VERSION}",
            key=folder,
            remedy="Use the code that wrote it",
        )
    partitions.load_into_engine(engine, ShardReader(folder), manifest["scaler"])
    state = TrainState(**manifest["train_state"])
    engine.global_steps, engine.skipped_steps = state.step, manifest["skipped_steps"]
    saved_layout, current_layout = manifest["layout"], partitions.partition_layout(engine)
    if saved_layout != current_layout:
        warn(
            f"{folder.name} was written by {saved_layout['world_size']} ranks at ZeRO-{saved_layout['stage']}; "
            f"repartitioned for {current_layout['world_size']} ranks at ZeRO-{current_layout['stage']}"
        )
    return state


def find_checkpoint(run_dir: Path, step: int | None) -> Path:
    """The checkpoint of `step`, or with None the newest undamaged one.

    Raises:
        UserError: there is none; the message lists the existing ones.
    """
    storage = storage_of(run_dir)
    available = storage.list()
    if not available:
        raise UserError(f"{run_dir} has no checkpoint", key="run", remedy="Train it first, or check the name")
    candidates, names = available[::-1] if step is None else [layout.step_name(step)], ", ".join(available)
    if step is not None and candidates[0] not in available:
        raise UserError(f"{run_dir} has no such checkpoint", key="step", value=step, remedy=f"It has: {names}")
    for name in candidates:
        folder = storage.open(name)
        problem = find_corruption(folder)
        if problem is None:
            return folder
        print(
            f"{folder} is damaged ({problem}){'; the previous checkpoint is used' if step is None else ''}", flush=True
        )
    raise UserError(
        f"is damaged, and there is no other candidate. The run has: {names}",
        key=storage.open(candidates[0]),
        remedy="Give another step=, or train it again",
    )
