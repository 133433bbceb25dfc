"""What of the trained weights and of the optimizer this rank holds, at every ZeRO stage, and putting it back."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from fireflyds.errors import UserError
from fireflyds.zero.engine import Engine

MASTER, OPAQUE, SCALAR = "master", "raw", "#"


@dataclass(frozen=True, slots=True)
class ParamSlice:
    """Elements `[first, first + length)` of a flattened parameter, at `offset` of a partition."""

    name: str
    first: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class FlatPartition:
    """A one-dimensional tensor of weights that the optimizer sees as one, and its states.

    `state` is the optimizer's own dictionary: filling it fills the optimizer.
    """

    master: Tensor
    state: dict[str, Any]
    slices: list[ParamSlice] = field(default_factory=list)

    def is_per_element(self, value: Any) -> bool:
        """A state with one number for every weight."""
        same = isinstance(value, Tensor) and value.dim() > 0 and value.numel() == self.master.numel()
        return same and value.is_floating_point()

    @property
    def has_opaque_state(self) -> bool:
        """Whether a state cannot be divided with the weights: quantised in blocks, or of a layout of its own."""
        return any(
            isinstance(value, Tensor) and value.numel() > 1 and not self.is_per_element(value)
            for value in self.state.values()
        )


class SavedPartitions(Protocol):
    """Partitions that any number of ranks saved at any ZeRO stage, read as whole parameters or slices of them."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    layout: dict[str, Any]

    @property
    def has_opaque_states(self) -> bool: ...

    def state_names(self, name: str) -> list[str]: ...

    def opaque_states(self, rank: int, number: int) -> dict[str, Tensor]: ...

    def scalar_state(self, name: str, kind: str) -> float: ...

    def read(self, name: str, kind: str, first: int, length: int) -> Tensor: ...


# Of the loss scaler: everything that changes while training.
_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def owned_partitions(engine: Engine) -> Iterator[tuple[int, FlatPartition]]:
    """The stretches that this rank saves, numbered. At stage 0, where every rank has all, they are dealt out."""
    alone = engine.zero_optimization_stage() == 0
    for number, partition in enumerate(_partitions(engine)):
        if not alone or number % dist.get_world_size() == dist.get_rank():
            yield number, partition


def partition_layout(engine: Engine) -> dict[str, Any]:
    """How weights are spread over ranks; only states that cannot be cut depend on it."""
    return {"stage": int(engine.zero_optimization_stage()), "world_size": dist.get_world_size()}


def param_shapes(engine: Engine) -> dict[str, list[int]]:
    """Of every parameter that trains, whole."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def _partitions(engine: Engine) -> Iterator[FlatPartition]:
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if stage == 3:
        for number in range(len(optimizer.fp16_groups)):
            with _swapped_in(optimizer, number):
                yield _stage3_partition(optimizer, number, names)
    elif stage:
        for parameters, master in zip(*_param_groups(optimizer), strict=True):
            parts = [
                ParamSlice(names[id(p)], at.lp_fragment_address.start, at.hp_fragment_address.start, at.hp_fragment_address.numel)
                for p in parameters if (at := p._hp_mapping) is not None
            ]  # fmt: skip
            yield FlatPartition(master, optimizer.optimizer.state[master], parts)
    else:
        for parameter, master in _replicated_params(optimizer):
            state = getattr(optimizer, "optimizer", optimizer).state[master]
            yield FlatPartition(master.data, state, [ParamSlice(names[id(parameter)], 0, 0, parameter.numel())])


def _param_groups(optimizer: Any) -> tuple[list[Any], list[Tensor]]:
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    return optimizer.bf16_groups, optimizer.fp32_groups_flat_partition  # bf16 with float32 accumulation


def _replicated_params(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """At stage 0: parameters, and what the optimizer updates in their place."""
    if hasattr(optimizer, "fp32_groups"):
        for narrow, wide in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(narrow, wide, strict=True)
    else:
        for group in optimizer.param_groups:
            yield from ((parameter, parameter) for parameter in group["params"])


def _stage3_partition(optimizer: Any, number: int, names: dict[int, str]) -> FlatPartition:
    """A sub-group of stage 3: an equal share of every parameter, the last one padded."""
    parts = []
    for parameter in optimizer.fp16_groups[number]:
        _, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
        first = share * dist.get_rank(group=optimizer.dp_process_group)
        if (length := min(share, parameter.ds_numel - first)) > 0:
            parts.append(ParamSlice(names[id(parameter)], first, int(offset), length))
    master = optimizer.fp32_partitioned_groups_flat[number]
    return FlatPartition(master, optimizer.optimizer.state[master], parts)


@contextmanager
def _swapped_in(optimizer: Any, number: int) -> Iterator[None]:
    """Inside, a sub-group that lives on NVMe is in memory; what changes there goes back."""
    away = optimizer._swappable_optimizer_subgroup(number)
    if away:
        optimizer._optimizer_states_and_gradient_swap_in(number)
    try:
        yield
    finally:
        if away:
            optimizer._optimizer_states_and_gradient_swap_out(number)


def loss_scaler_state(engine: Engine) -> dict[str, Any]:
    """The loss scale and what it depends on; empty but for float16."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in _SCALER_KEYS if engine.fp16_enabled() and hasattr(scaler, key)}


def load_into_engine(engine: Engine, saved: SavedPartitions, scaler: dict[str, Any]) -> None:
    """Put saved weights and states into an engine, whatever ranks and stage wrote them.

    Raises:
        UserError: something that trains here was not saved, or cannot be divided anew.
    """
    now = partition_layout(engine)
    if saved.has_opaque_states and saved.layout != now:
        was = saved.layout
        raise UserError(
            f"{saved.folder}: the states of this optimizer cannot be divided anew; they are of {was['world_size']} ranks at "
            f"zero.stage={was['stage']}, now there are {now['world_size']} at {now['stage']}. Start as there, or export the run "
            "and give model=<its export> under another run="
        )
    missing = [name for name in param_shapes(engine) if name not in saved.shapes]
    if missing:
        raise UserError(f"{saved.folder}: lacks {missing[0]}, which trains here. Give the run that this is of")
    _create_optimizer_states(engine)
    for number, partition in enumerate(_partitions(engine)):
        _load_partition(partition, number, saved)
    _copy_masters_to_model(engine)
    for key, value in scaler.items():
        setattr(engine.optimizer.loss_scaler, key, value)


@torch.no_grad()
def _load_partition(partition: FlatPartition, number: int, saved: SavedPartitions) -> None:
    for part in partition.slices:
        at = slice(part.offset, part.offset + part.length)
        weights = saved.read(part.name, MASTER, part.first, part.length)
        partition.master.view(-1)[at].copy_(weights)
        for kind in saved.state_names(part.name):
            if kind.startswith(SCALAR):
                _set_scalar_state(partition.state, kind.removeprefix(SCALAR), saved.scalar_state(part.name, kind))
                continue
            piece = saved.read(part.name, kind, part.first, part.length)
            if kind not in partition.state:
                partition.state[kind] = torch.zeros_like(partition.master, dtype=piece.dtype)
            partition.state[kind].view(-1)[at].copy_(piece)
    for kind, value in saved.opaque_states(dist.get_rank(), number).items():
        held = partition.state.get(kind)
        if isinstance(held, Tensor) and held.numel() == value.numel():
            held.copy_(value.view(held.shape))
        elif value.numel() == 1 and not isinstance(held, Tensor):
            partition.state[kind] = value.item()
        else:
            partition.state[kind] = value.to(partition.master.device)


def _set_scalar_state(state: dict[str, Any], key: str, value: float) -> None:
    held = state.get(key)
    if isinstance(held, Tensor):
        held.fill_(value)
    else:
        state[key] = type(held)(value) if held is not None else value


def _create_optimizer_states(engine: Engine) -> None:
    """One step with zero gradients at learning rate 0 where the optimizer has made no states yet: it knows their form.

    All of them are then overwritten.
    """
    if engine.zero_optimization_stage() == 3:  # it shows its optimizer the weights while it steps only
        engine.optimizer._set_fp32_optimizer_param_groups()
        _step_with_zero_gradients(engine.optimizer.optimizer)
        engine.optimizer._clear_fp32_optimizer_param_groups()
    else:
        _step_with_zero_gradients(getattr(engine.optimizer, "optimizer", engine.optimizer))


def _step_with_zero_gradients(inner: Any) -> None:
    masters = [parameter for group in inner.param_groups for parameter in group["params"]]
    if any(inner.state[parameter] for parameter in masters):
        return
    held = [(parameter, parameter.grad) for parameter in masters]
    rates = [group["lr"] for group in inner.param_groups]
    for group in inner.param_groups:
        group["lr"] = 0.0
    for parameter in masters:
        parameter.grad = torch.zeros_like(parameter)
    inner.step()
    for parameter, gradient in held:
        parameter.grad = gradient
    for group, rate in zip(inner.param_groups, rates, strict=True):
        group["lr"] = rate


def _copy_masters_to_model(engine: Engine) -> None:
    """The model's own weights follow the masters."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for number in range(len(optimizer.fp16_groups)):
            with _swapped_in(optimizer, number):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if persistent := optimizer.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
    elif stage:
        optimizer.update_lp_params()
    else:
        with torch.no_grad():
            for parameter, master in _replicated_params(optimizer):
                parameter.copy_(master)
