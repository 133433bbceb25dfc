"""Checkpoints: whole or absent, the newest whole one found again, weights consolidated for the export."""

import contextlib
import io
import shutil
from pathlib import Path
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from fireflyds.engine.deepspeed import on_rank_zero, pick_accelerator
from fireflyds.engine.optimizers import page_again
from fireflyds.errors import UserError
from fireflyds.types import TrainState

FOLDER = "checkpoints"


def step_name(step: int) -> str:
    return f"step-{step:06d}"


class Keeper(Protocol):
    """Adds what was learnt to a checkpoint on rank 0, and refuses what was not saved whole."""

    def keep(self, folder: Path, step: int, skipped: int) -> None: ...


def save(engine: Any, run_dir: Path, state: TrainState, keep: int, keeper: Keeper) -> Path:
    """Write the checkpoint of this step aside on all ranks, then rename it, then drop the oldest beyond `keep`.

    Raises:
        UserError: what was read back is not whole; nothing is renamed then.
    """
    folder = run_dir / FOLDER
    whole = folder / step_name(state.step)
    aside = f".{whole.name}.partial"
    if dist.get_rank() == 0:
        shutil.rmtree(folder / aside, ignore_errors=True)
    dist.barrier()
    # Stages 1 and 2 need the universal info in the client state to be readable by another number of ranks.
    client_state = {
        "train_state": state.as_dict(),
        "universal_checkpoint_info": {},
        "master_names": _master_names(engine),
    }
    engine.save_checkpoint(
        str(folder),
        tag=aside,
        client_state=client_state,
        save_latest=False,
        exclude_frozen_parameters=True,
    )
    dist.barrier()
    on_rank_zero(lambda: keeper.keep(folder / aside, state.step, engine.skipped_steps))
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
    page_again(getattr(engine.optimizer, "optimizer", engine.optimizer))
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


def trained_weights(checkpoint: Path) -> dict[str, Tensor]:
    """What trained, by the names of the model's own parameters, in float32: gathered from all ranks' shards."""
    if not list(checkpoint.glob("*_optim_states.pt")):  # stage 0: whole on every rank
        states = _load(checkpoint / "mp_rank_00_model_states.pt")
        module: dict[str, Tensor] = dict(states["module"])
        for names, tensors in zip(states["master_names"], states["optimizer"].get("fp32_groups", ()), strict=False):
            module |= dict(zip(names, tensors, strict=True))
        return module
    pick_accelerator()
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    with contextlib.redirect_stdout(io.StringIO()):  # it tells every shape
        weights: dict[str, Tensor] = get_fp32_state_dict_from_zero_checkpoint(
            str(checkpoint.parent), tag=checkpoint.name, exclude_frozen_parameters=True
        )
    return weights


def _master_names(engine: Any) -> list[list[str]]:
    """At stage 0 in 16 bit: the names of the 32-bit masters, group by group as the optimizer holds them."""
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    groups = getattr(engine.optimizer, "fp16_groups", ()) if engine.zero_optimization_stage() == 0 else ()
    return [[names[id(parameter)] for parameter in group] for group in groups]


def verify(checkpoint: Path, expected: dict[str, tuple[int, ...]]) -> None:
    """Read back which tensors, by the names of the model's own parameters, a checkpoint says it holds, that every
    rank's shard can be opened, and that not all weights of the first are zero.

    Raises:
        UserError: a trained tensor is missing or of another shape, or there are only zeros.
    """
    found = sorted(checkpoint.glob("*mp_rank_00_model_states.pt"))
    if not found:
        raise UserError(f"{checkpoint}: holds no model states. The checkpoint before is whole; look at the disk")
    states = _load(found[0])
    if groups := states.get("param_shapes"):
        shapes = {name: tuple(shape) for group in groups for name, shape in group.items()}
    else:
        shapes = {name: tuple(tensor.shape) for name, tensor in states["module"].items()}
    wrong = [name for name, shape in expected.items() if shapes.get(name) != shape]
    shards = sorted(checkpoint.glob("*_optim_states.pt"))
    if shards and len(shards) != dist.get_world_size():
        raise UserError(
            f"{checkpoint}: holds {len(shards)} shards of {dist.get_world_size()}. Every rank must write to the same folder: "
            "give runs= on a disk that all nodes share"
        )
    flat: list[Tensor] = []
    for shard in shards:
        state = _load(shard)["optimizer_state_dict"]
        flat = flat or state.get("fp32_flat_groups") or state.get("single_partition_of_fp32_groups") or []
    if wrong or (flat and not any(part.any() for part in flat)):
        what = f"{wrong[0]} is {shapes.get(wrong[0], 'missing')}" if wrong else "its weights are zeros only"
        raise UserError(f"{checkpoint}: was not saved whole ({what}). The checkpoint before is whole; look at the disk")


def _load(file: Path) -> dict[str, Any]:
    import torch

    try:
        states: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=False, mmap=True)
    except (RuntimeError, OSError, EOFError) as error:
        raise UserError(
            f"{file}: cannot be read back ({error}). Look at the disk, and go on from a checkpoint before"
        ) from error
    return states
