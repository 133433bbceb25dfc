"""Partitions of trainable weights and optimizer states on this rank, at every ZeRO stage: access and restoring."""

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
    """Elements `[first, first + length)` of a flattened parameter, stored at element `offset` of a partition."""

    name: str
    first: int
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class FlatPartition:
    """A tensor of master weights that is one parameter to the optimizer, and its states.

    `state` is the dictionary of the optimizer itself, not a copy. `slices`: the parameters that `master` consists of.
    """

    master: Tensor
    state: dict[str, Any]
    slices: list[ParamSlice] = field(default_factory=list)

    def is_per_element(self, value: Any) -> bool:
        """True for a floating-point state with one element per weight."""
        same = isinstance(value, Tensor) and value.dim() > 0 and value.numel() == self.master.numel()
        return same and value.is_floating_point()

    @property
    def has_opaque_state(self) -> bool:
        """True where a state cannot be sliced with the weights, such as one that is quantised in blocks."""
        return any(
            isinstance(value, Tensor) and value.numel() > 1 and not self.is_per_element(value)
            for value in self.state.values()
        )


class SavedPartitions(Protocol):
    """Reader of saved partitions, of any number of ranks and any ZeRO stage, as slices of flattened parameters."""

    folder: Path
    shapes: dict[str, tuple[int, ...]]
    layout: dict[str, Any]

    @property
    def has_opaque_states(self) -> bool:
        """True where a saved state cannot be sliced with the weights, such as one quantised in blocks."""

    def state_names(self, name: str) -> list[str]:
        """Kinds of the optimizer states saved for the parameter `name`."""

    def opaque_states(self, rank: int, number: int) -> dict[str, Tensor]:
        """States of partition `number` of `rank` that cannot be sliced, by name."""

    def scalar_state(self, name: str, kind: str) -> float:
        """Value of a scalar state of the parameter `name`, such as its step count."""

    def read(self, name: str, kind: str, first: int, length: int) -> Tensor:
        """`[length]` elements of the flattened parameter or state `kind` of `name`, from element `first` on."""


# Attributes of DeepSpeed's loss scaler that change during training.
_SCALER_KEYS = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def owned_partitions(engine: Engine) -> Iterator[tuple[int, FlatPartition]]:
    """Yields the partitions that this rank saves, with their indices.

    At stage 0 every rank has all partitions, and they are assigned to ranks round-robin.
    """
    replicated = engine.zero_optimization_stage() == 0
    for number, partition in enumerate(_all_partitions(engine)):
        if not replicated or number % dist.get_world_size() == dist.get_rank():
            yield number, partition


def partition_layout(engine: Engine) -> dict[str, Any]:
    """Returns the ZeRO stage and the number of ranks. Only opaque states must be loaded in the same layout."""
    return {"stage": int(engine.zero_optimization_stage()), "world_size": dist.get_world_size()}


def param_shapes(engine: Engine) -> dict[str, list[int]]:
    """Returns the unpartitioned shape of every trainable parameter, by name."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def _all_partitions(engine: Engine) -> Iterator[FlatPartition]:
    """Yields all partitions on this rank, in the order of DeepSpeed's sub-groups (stage 3), groups or parameters."""
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if stage == 3:
        for number in range(len(optimizer.fp16_groups)):
            with _swapped_in(optimizer, number):
                yield _stage3_partition(optimizer, number, names)
    elif stage:
        for parameters, master in zip(*_param_groups(optimizer), strict=True):
            slices = [
                ParamSlice(
                    names[id(p)],
                    mapping.lp_fragment_address.start,
                    mapping.hp_fragment_address.start,
                    mapping.hp_fragment_address.numel,
                )
                for p in parameters
                if (mapping := p._hp_mapping) is not None
            ]
            yield FlatPartition(master, optimizer.optimizer.state[master], slices)
    else:
        for parameter, master in _replicated_params(optimizer):
            state = getattr(optimizer, "optimizer", optimizer).state[master]
            yield FlatPartition(master.data, state, [ParamSlice(names[id(parameter)], 0, 0, parameter.numel())])


def _param_groups(optimizer: Any) -> tuple[list[Any], list[Tensor]]:
    """At stages 1 and 2: the parameters of each group, and its flat float32 partition on this rank."""
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    return optimizer.bf16_groups, optimizer.fp32_groups_flat_partition  # bf16 with float32 accumulation


def _replicated_params(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """At stage 0: yields each parameter with the tensor that the optimizer updates, a float32 master or itself."""
    if hasattr(optimizer, "fp32_groups"):
        for parameters, masters in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(parameters, masters, strict=True)
    else:
        for group in optimizer.param_groups:
            yield from ((parameter, parameter) for parameter in group["params"])


def _stage3_partition(optimizer: Any, number: int, names: dict[int, str]) -> FlatPartition:
    """The partition of a stage-3 sub-group: an equal share of every parameter; the share of the last rank is padded."""
    slices = []
    for parameter in optimizer.fp16_groups[number]:
        _, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
        first = share * dist.get_rank(group=optimizer.dp_process_group)
        if (length := min(share, parameter.ds_numel - first)) > 0:
            slices.append(ParamSlice(names[id(parameter)], first, int(offset), length))
    master = optimizer.fp32_partitioned_groups_flat[number]
    return FlatPartition(master, optimizer.optimizer.state[master], slices)


@contextmanager
def _swapped_in(optimizer: Any, number: int) -> Iterator[None]:
    """Context in which a sub-group that is offloaded to NVMe is in memory; changes are written back at the end."""
    offloaded = optimizer._swappable_optimizer_subgroup(number)
    if offloaded:
        optimizer._optimizer_states_and_gradient_swap_in(number)
    try:
        yield
    finally:
        if offloaded:
            optimizer._optimizer_states_and_gradient_swap_out(number)


def loss_scaler_state(engine: Engine) -> dict[str, Any]:
    """Returns the state of the fp16 loss scaler; empty for other precisions."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in _SCALER_KEYS if engine.fp16_enabled() and hasattr(scaler, key)}


def load_into_engine(engine: Engine, saved: SavedPartitions, scaler: dict[str, Any]) -> None:
    """Loads weights, optimizer states and loss-scaler state, saved by any number of ranks at any stage, into an engine.

    Raises:
        UserError: a trainable parameter was not saved, or opaque states were saved with another layout.
    """
    current, previous = partition_layout(engine), saved.layout
    if saved.has_opaque_states and previous != current:
        raise UserError(
            f"the states of this optimizer cannot be repartitioned; they were saved by {previous['world_size']} ranks "
            f"at zero.stage={previous['stage']}, this run has {current['world_size']} ranks at "
            f"zero.stage={current['stage']}",
            key=saved.folder,
            remedy="Use the same ranks and stage, or export the run and give model=<its export> under another run=",
        )
    missing = [name for name in param_shapes(engine) if name not in saved.shapes]
    if missing:
        raise UserError(
            f"lacks the trainable {missing[0]}", key=saved.folder, remedy="Give the run that this checkpoint is from"
        )
    _create_optimizer_states(engine)
    for number, partition in enumerate(_all_partitions(engine)):
        _load_partition(partition, number, saved)
    _copy_masters_to_model(engine)
    for key, value in scaler.items():
        setattr(engine.optimizer.loss_scaler, key, value)


@torch.no_grad()
def _load_partition(partition: FlatPartition, number: int, saved: SavedPartitions) -> None:
    """Copies saved weights and states into one partition; `number` is its index on this rank."""
    for param in partition.slices:
        index = slice(param.offset, param.offset + param.length)
        weights = saved.read(param.name, MASTER, param.first, param.length)
        partition.master.view(-1)[index].copy_(weights)
        for kind in saved.state_names(param.name):
            if kind.startswith(SCALAR):
                scalar = saved.scalar_state(param.name, kind)
                _set_scalar_state(partition.state, kind.removeprefix(SCALAR), scalar)
                continue
            values = saved.read(param.name, kind, param.first, param.length)
            if kind not in partition.state:
                partition.state[kind] = torch.zeros_like(partition.master, dtype=values.dtype)
            partition.state[kind].view(-1)[index].copy_(values)
    for kind, value in saved.opaque_states(dist.get_rank(), number).items():
        current = partition.state.get(kind)
        if isinstance(current, Tensor) and current.numel() == value.numel():
            current.copy_(value.view(current.shape))
        elif value.numel() == 1 and not isinstance(current, Tensor):
            partition.state[kind] = value.item()
        else:
            partition.state[kind] = value.to(partition.master.device)


def _set_scalar_state(state: dict[str, Any], key: str, value: float) -> None:
    current = state.get(key)
    if isinstance(current, Tensor):
        current.fill_(value)
    else:
        state[key] = type(current)(value) if current is not None else value


def _create_optimizer_states(engine: Engine) -> None:
    """Creates missing optimizer states by one step with zero gradients at learning rate 0.

    The optimizer itself defines their shapes and dtypes; all values are overwritten afterwards.
    """
    if engine.zero_optimization_stage() == 3:  # the inner optimizer has the weights only during a step
        engine.optimizer._set_fp32_optimizer_param_groups()
        _step_with_zero_gradients(engine.optimizer.optimizer)
        engine.optimizer._clear_fp32_optimizer_param_groups()
    else:
        _step_with_zero_gradients(getattr(engine.optimizer, "optimizer", engine.optimizer))


def _step_with_zero_gradients(inner: Any) -> None:
    masters = [parameter for group in inner.param_groups for parameter in group["params"]]
    if any(inner.state[parameter] for parameter in masters):
        return
    gradients = [(parameter, parameter.grad) for parameter in masters]
    rates = [group["lr"] for group in inner.param_groups]
    for group in inner.param_groups:
        group["lr"] = 0.0
    for parameter in masters:
        parameter.grad = torch.zeros_like(parameter)
    inner.step()
    for parameter, gradient in gradients:
        parameter.grad = gradient
    for group, rate in zip(inner.param_groups, rates, strict=True):
        group["lr"] = rate


def _copy_masters_to_model(engine: Engine) -> None:
    """Updates the weights of the model from the master weights."""
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
