"""What of the trained weights and of the optimizer this rank holds, at every ZeRO stage, and putting it back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from fireflyds.engine.fragments import COUNTER, MASTER, Fragments, Part, Stretch
from fireflyds.errors import UserError

# Of the loss scaler: everything that changes while training.
_SCALER = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")


def owned(engine: Any) -> Iterator[tuple[int, Stretch]]:
    """The stretches that this rank saves, numbered. At stage 0, where every rank has all, they are dealt out."""
    alone = engine.zero_optimization_stage() == 0
    for number, stretch in enumerate(_stretches(engine)):
        if not alone or number % dist.get_world_size() == dist.get_rank():
            yield number, stretch


def layout(engine: Any) -> dict[str, Any]:
    """How weights are spread over ranks; only states that cannot be cut depend on it."""
    return {"stage": int(engine.zero_optimization_stage()), "world_size": dist.get_world_size()}


def shapes(engine: Any) -> dict[str, list[int]]:
    """Of every parameter that trains, whole."""
    return {
        name: list(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }


def _stretches(engine: Any) -> Iterator[Stretch]:
    stage, optimizer = engine.zero_optimization_stage(), engine.optimizer
    names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
    if stage == 3:
        for number in range(len(optimizer.fp16_groups)):
            with _resident(optimizer, number):
                yield _sharded(optimizer, number, names)
    elif stage:
        for parameters, master in zip(*_groups(optimizer), strict=True):
            parts = [
                Part(names[id(p)], at.lp_fragment_address.start, at.hp_fragment_address.start, at.hp_fragment_address.numel)
                for p in parameters if (at := p._hp_mapping) is not None
            ]  # fmt: skip
            yield Stretch(master, optimizer.optimizer.state[master], parts)
    else:
        for parameter, master in _replicated(optimizer):
            state = getattr(optimizer, "optimizer", optimizer).state[master]
            yield Stretch(master.data, state, [Part(names[id(parameter)], 0, 0, parameter.numel())])


def _groups(optimizer: Any) -> tuple[list[Any], list[Tensor]]:
    if hasattr(optimizer, "single_partition_of_fp32_groups"):
        return optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups
    return optimizer.bf16_groups, optimizer.fp32_groups_flat_partition  # bf16 with float32 accumulation


def _replicated(optimizer: Any) -> Iterator[tuple[Tensor, Tensor]]:
    """At stage 0: parameters, and what the optimizer updates in their place."""
    if hasattr(optimizer, "fp32_groups"):
        for narrow, wide in zip(optimizer.fp16_groups, optimizer.fp32_groups, strict=True):
            yield from zip(narrow, wide, strict=True)
    else:
        for group in optimizer.param_groups:
            yield from ((parameter, parameter) for parameter in group["params"])


def _sharded(optimizer: Any, number: int, names: dict[int, str]) -> Stretch:
    """A sub-group of stage 3: an equal share of every parameter, the last one padded."""
    parts = []
    for parameter in optimizer.fp16_groups[number]:
        _, offset, share = optimizer.grad_position[optimizer.get_param_id(parameter)]
        first = share * dist.get_rank(group=optimizer.dp_process_group)
        if (length := min(share, parameter.ds_numel - first)) > 0:
            parts.append(Part(names[id(parameter)], first, int(offset), length))
    master = optimizer.fp32_partitioned_groups_flat[number]
    return Stretch(master, optimizer.optimizer.state[master], parts)


@contextmanager
def _resident(optimizer: Any, number: int) -> Iterator[None]:
    """Inside, a sub-group that lives on NVMe is in memory; what changes there goes back."""
    away = optimizer._swappable_optimizer_subgroup(number)
    if away:
        optimizer._optimizer_states_and_gradient_swap_in(number)
    try:
        yield
    finally:
        if away:
            optimizer._optimizer_states_and_gradient_swap_out(number)


def scaler_state(engine: Any) -> dict[str, Any]:
    """The loss scale and what it depends on; empty but for float16."""
    scaler = getattr(engine.optimizer, "loss_scaler", None)
    return {key: getattr(scaler, key) for key in _SCALER if engine.fp16_enabled() and hasattr(scaler, key)}


def fill(engine: Any, saved: Fragments, scaler: dict[str, Any]) -> None:
    """Put saved weights and states into an engine, whatever ranks and stage wrote them.

    Raises:
        UserError: something that trains here was not saved, or cannot be divided anew.
    """
    now = layout(engine)
    if saved.has_raw and saved.layout != now:
        was = saved.layout
        raise UserError(
            f"{saved.folder}: the states of this optimizer cannot be divided anew; they are of {was['world_size']} ranks at "
            f"zero.stage={was['stage']}, now there are {now['world_size']} at {now['stage']}. Start as there, or export the run "
            "and give model=<its export> under another run="
        )
    missing = [name for name in shapes(engine) if name not in saved.shapes]
    if missing:
        raise UserError(f"{saved.folder}: lacks {missing[0]}, which trains here. Give the run that this is of")
    _prime(engine)
    for number, stretch in enumerate(_stretches(engine)):
        _fill(stretch, number, saved)
    _refresh(engine)
    for key, value in scaler.items():
        setattr(engine.optimizer.loss_scaler, key, value)


@torch.no_grad()
def _fill(stretch: Stretch, number: int, saved: Fragments) -> None:
    for part in stretch.parts:
        at = slice(part.offset, part.offset + part.length)
        weights = saved.read(part.name, MASTER, part.first, part.length)
        stretch.master.view(-1)[at].copy_(weights)
        for kind in saved.kinds(part.name):
            if kind.startswith(COUNTER):
                _count(stretch.state, kind.removeprefix(COUNTER), saved.counter(part.name, kind))
                continue
            piece = saved.read(part.name, kind, part.first, part.length)
            if kind not in stretch.state:
                stretch.state[kind] = torch.zeros_like(stretch.master, dtype=piece.dtype)
            stretch.state[kind].view(-1)[at].copy_(piece)
    for kind, value in saved.raw(dist.get_rank(), number).items():
        held = stretch.state.get(kind)
        if isinstance(held, Tensor) and held.numel() == value.numel():
            held.copy_(value.view(held.shape))
        elif value.numel() == 1 and not isinstance(held, Tensor):
            stretch.state[kind] = value.item()
        else:
            stretch.state[kind] = value.to(stretch.master.device)


def _count(state: dict[str, Any], key: str, value: float) -> None:
    held = state.get(key)
    if isinstance(held, Tensor):
        held.fill_(value)
    else:
        state[key] = type(held)(value) if held is not None else value


def _prime(engine: Any) -> None:
    """One step with zero gradients at learning rate 0 where the optimizer has made no states yet: it knows their form.

    All of them are then overwritten.
    """
    if engine.zero_optimization_stage() == 3:  # it shows its optimizer the weights while it steps only
        engine.optimizer._set_fp32_optimizer_param_groups()
        _step_on_nothing(engine.optimizer.optimizer)
        engine.optimizer._clear_fp32_optimizer_param_groups()
    else:
        _step_on_nothing(getattr(engine.optimizer, "optimizer", engine.optimizer))


def _step_on_nothing(inner: Any) -> None:
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


def _refresh(engine: Any) -> None:
    """The model's own weights follow the masters."""
    optimizer, stage = engine.optimizer, engine.zero_optimization_stage()
    if stage == 3:
        for number in range(len(optimizer.fp16_groups)):
            with _resident(optimizer, number):
                optimizer._reassign_or_swap_out_partitioned_parameters(number)
        if persistent := optimizer.persistent_parameters:
            persistent[0].partition(persistent)
            persistent[0].all_gather(persistent)
    elif stage:
        optimizer.update_lp_params()
    else:
        with torch.no_grad():
            for parameter, master in _replicated(optimizer):
                parameter.copy_(master)
