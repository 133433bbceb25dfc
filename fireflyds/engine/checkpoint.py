"""Checkpoints: whole or absent, the newest whole one found again, weights consolidated for the export."""

import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch import Tensor

from fireflyds.errors import UserError
from fireflyds.types import TrainState

FOLDER = "checkpoints"


def step_name(step: int) -> str:
    return f"step-{step:06d}"


def save(engine: Any, run_dir: Path, state: TrainState, *, adapters_only: bool, keep: int) -> Path:
    """Write the checkpoint of this step aside on all ranks, then rename it, then drop the oldest beyond `keep`."""
    folder = run_dir / FOLDER
    whole = folder / step_name(state.step)
    aside = f".{whole.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(folder / aside, ignore_errors=True)
    dist.barrier()
    # Stages 1 and 2 need the universal info in the client state to be readable by another number of ranks.
    client_state = {"train_state": state.as_dict(), "universal_checkpoint_info": {}}
    engine.save_checkpoint(
        str(folder), tag=aside, client_state=client_state, save_latest=False, exclude_frozen_parameters=adapters_only
    )
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(whole, ignore_errors=True)
        (folder / aside).rename(whole)
        for old in whole_checkpoints(run_dir)[:-keep]:
            shutil.rmtree(old)
    dist.barrier()
    return whole


def whole_checkpoints(run_dir: Path) -> list[Path]:
    """Checkpoints by step. One that is being written has another name."""
    return sorted((run_dir / FOLDER).glob("step-*"), key=lambda path: int(path.name.removeprefix("step-")))


def load(engine: Any, run_dir: Path) -> TrainState:
    """Restore the newest whole checkpoint into the engine; the start of a run when there is none.

    Raises:
        UserError: it was written by another number of ranks.
    """
    found = whole_checkpoints(run_dir)
    if not found:
        return TrainState()
    newest = found[-1]
    written_by = len(list(newest.glob("*_optim_states.pt"))) or dist.get_world_size()
    if written_by != dist.get_world_size():
        raise UserError(
            f"{newest}: written by {written_by} ranks, now there are {dist.get_world_size()}. Start with {written_by} ranks, "
            "or give another run= and model=<export of this run>"
        )
    path, client_state = engine.load_checkpoint(str(newest.parent), tag=newest.name, load_module_strict=False)
    if path is None:
        raise UserError(f"{newest}: cannot be read back. Remove it to go on from the one before")
    return TrainState(**client_state["train_state"])


def find(run_dir: Path, step: int | None) -> Path:
    """The checkpoint of a step, or the newest.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    found = whole_checkpoints(run_dir)
    if not found:
        raise UserError(f"run: {run_dir} has no checkpoint. Train it first, or check the name")
    if step is None:
        return found[-1]
    wanted = run_dir / FOLDER / step_name(step)
    if wanted not in found:
        raise UserError(
            f"step={step}: {run_dir} has no such checkpoint. It has: {', '.join(path.name for path in found)}"
        )
    return wanted


def trained_weights(checkpoint: Path, *, adapters_only: bool) -> dict[str, Tensor]:
    """The float32 weights in a checkpoint, gathered from all ranks' shards (or only those that trained)."""
    import torch

    if not list(checkpoint.glob("*_optim_states.pt")):  # stage 0: whole on every rank
        states = torch.load(checkpoint / "mp_rank_00_model_states.pt", map_location="cpu", weights_only=False)
        module: dict[str, Tensor] = states["module"]
        return module
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
        str(checkpoint.parent), tag=checkpoint.name, exclude_frozen_parameters=adapters_only
    )
    return weights
