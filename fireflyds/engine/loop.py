"""The training loop: a generator, one optimizer step per `yield`."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fireflyds.config import TrainConfig
from fireflyds.engine.deepspeed import loss_scale
from fireflyds.engine.overflow import Skips, Watch
from fireflyds.engine.schedule import lr_factor
from fireflyds.engine.statistics import Measured, Statistics
from fireflyds.errors import UserError
from fireflyds.types import PackedBatch, StepMetrics, TrainState


class Loader(Protocol):
    def steps(self, first: int, end: int) -> Iterator[list[PackedBatch]]: ...

    def documents(self, number: int, micro: int) -> str: ...

    def require(self, steps: int) -> None: ...


def train_steps(
    engine: Any,
    loader: Loader,
    state: TrainState,
    config: TrainConfig,
    total_steps: int,
    to_device: Callable[[PackedBatch, torch.device], dict[str, Any]],
    measured: Measured,
) -> Iterator[StepMetrics]:
    """Steps `state.step` to `total_steps`; `state` is advanced before each yield.

    The loss of a step is the sum over all learned tokens of all ranks and micro-batches, divided by their
    number: the whole step's batches are read first, and their count summed over the ranks. A step whose loss or gradients
    are not finite changes nothing and is counted.

    Raises:
        UserError: `max_skipped` such steps in a row, or under fp16 a gradient that is not finite at the least loss
            scale; the message names the first tensor that is not, and the documents.
    """
    world_size = dist.get_world_size()
    engine.train()
    watch = Watch(engine.module)
    statistics = Statistics(measured, engine.device, total_steps)
    skips = Skips(engine, config.recovery.max_skipped)
    ready = loader.steps(state.step + state.passed_over, total_steps + state.passed_over)
    for number in range(state.step, total_steps):
        started = time.perf_counter()
        batches = next(ready)
        waited = time.perf_counter() - started
        # Dropout is a function of the step, so a resumed run drops what an undisturbed one would have.
        reseed = partial(torch.manual_seed, config.seed * 1_000_003 + number * world_size + dist.get_rank())
        reseed()
        learned, tokens = statistics.begin(batches, waited)
        factor, scale = lr_factor(number, total_steps, config.optim), loss_scale(engine)
        for group in engine.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * factor
        watched = watch if skips.begin() else None
        watch.forget()
        documents = partial(loader.documents, number + state.passed_over)
        try:
            loss, norm = _optimizer_step(engine, batches, learned, to_device, watched, documents, statistics)
            if skips.are_too_many(loss):
                reseed()
                raise UserError(_not_finite(engine, batches, to_device, watch, documents, loss, norm, skips.in_row))
        except UserError as error:
            raise UserError(f"step {number + 1}: {error}") from error
        state.step, state.tokens = number + 1, state.tokens + tokens
        state.learned_tokens += learned
        seconds = time.perf_counter() - started
        extra = {"skipped_steps": float(engine.skipped_steps)} | ({} if scale is None else {"loss_scale": scale})
        extra |= statistics.finish(state.step, seconds, [group["lr"] for group in engine.optimizer.param_groups])
        yield StepMetrics(
            step=state.step, loss=loss, lr=config.optim.lr * factor, grad_norm=norm, tokens=state.tokens,
            learned_tokens=state.learned_tokens, tokens_per_second=tokens / seconds, seconds=seconds, extra=extra,
        )  # fmt: skip


def _optimizer_step(
    engine: Any,
    batches: list[PackedBatch],
    learned: int,
    to_device: Callable[[PackedBatch, torch.device], dict[str, Any]],
    watch: Watch | None,
    documents: Callable[[int], str],
    statistics: Statistics,
) -> tuple[float, float]:
    """Forward, backward and update over the step's micro-batches. Returns the loss per learned token and the gradient norm."""
    # DeepSpeed averages gradients over ranks and divides the loss by the accumulation; both are undone.
    scale = dist.get_world_size() * len(batches) / max(learned, 1)
    norm = None
    for number, batch in enumerate(batches):
        with watch.over(number) if watch else nullcontext():
            with statistics.forward():
                loss, losses = engine(**to_device(batch, engine.device), reduction="both")
            statistics.add(number, loss, losses)
            engine.backward(loss * scale)
        norm = _replicated_grad_norm(engine)
        if norm is not None and not bool(norm.isfinite()):
            _pass_over(engine)
        else:
            _update(engine, watch, documents)
    total = statistics.reduce()
    return float(total) / max(learned, 1), float(norm if norm is not None else engine.get_global_grad_norm() or 0.0)


def _pass_over(engine: Any) -> None:
    """What DeepSpeed does by itself where it holds 32-bit masters: take no step with gradients that are not finite."""
    engine.zero_grad()
    engine.micro_steps += 1
    engine.global_steps += 1
    engine.skipped_steps += 1


def _update(engine: Any, watch: Watch | None, documents: Callable[[int], str]) -> None:
    try:
        engine.step()
    except Exception as error:
        if "loss scale already at minimum" not in str(error) or watch is None:
            raise
        raise UserError(
            f"a gradient overflows float16 at the least loss scale ({loss_scale(engine):g}); {watch.report(documents)}. The "
            "newest checkpoint is whole. Lower optim.lr, look at that batch, or train where there is bf16"
        ) from error


def _not_finite(
    engine: Any,
    batches: list[PackedBatch],
    to_device: Callable[..., dict[str, Any]],
    watch: Watch,
    documents: Callable[[int], str],
    loss: float,
    norm: float,
    in_row: int,
) -> str:
    """Look for the cause in one more forward pass, with the weights and the random numbers of the first."""
    if not math.isfinite(loss):
        watch.forget()
        with torch.no_grad():
            for number, batch in enumerate(batches):
                with watch.over(number):
                    engine.module(**to_device(batch, engine.device))
    what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradients' norm is {norm}"
    return (
        f"{what}, the {in_row}. step in a row that is not finite (recovery.max_skipped); {watch.report(documents)}. These steps "
        "changed no weights and the newest checkpoint is whole. Lower optim.lr, or look at the data"
    )


def _replicated_grad_norm(engine: Any) -> torch.Tensor | None:
    """The norm before clipping where gradients are whole on every rank; elsewhere DeepSpeed knows it after the step."""
    if engine.zero_optimization_stage() > 0 or not engine.is_gradient_accumulation_boundary():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else None
