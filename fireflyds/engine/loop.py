"""The training loop: a generator, one optimizer step per `yield`."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist

from fireflyds.config import OptimConfig
from fireflyds.engine.schedule import learning_rate
from fireflyds.errors import UserError
from fireflyds.types import PackedBatch, StepMetrics, TrainState


class Loader(Protocol):
    def steps(self, first: int, end: int) -> Iterator[list[PackedBatch]]: ...


def train_steps(
    engine: Any,
    loader: Loader,
    state: TrainState,
    optim: OptimConfig,
    total_steps: int,
    seed: int,
    to_device: Callable[[PackedBatch, torch.device], dict[str, Any]],
) -> Iterator[StepMetrics]:
    """Steps `state.step` to `total_steps`; `state` is advanced before each yield.

    The loss of a step is the sum over all learned tokens of all ranks and micro-batches, divided by their
    number: the whole step's batches are read first, and their count summed over the ranks.

    Raises:
        UserError: the loss is not finite.
    """
    world_size = dist.get_world_size()
    engine.train()
    ready = loader.steps(state.step, total_steps)
    for number in range(state.step, total_steps):
        started = time.perf_counter()
        batches = next(ready)
        waited = time.perf_counter() - started
        # Dropout is a function of the step, so a resumed run drops what an undisturbed one would have.
        torch.manual_seed(seed * 1_000_003 + number * world_size + dist.get_rank())
        tokens = sum(batch.input_ids.numel() for batch in batches)
        counts = torch.tensor(
            [sum(batch.num_learned for batch in batches), tokens], dtype=torch.float64, device=engine.device
        )
        dist.all_reduce(counts)
        learned, tokens = int(counts[0]), int(counts[1])
        lr = learning_rate(number, total_steps, optim)
        for group in engine.optimizer.param_groups:
            group["lr"] = lr

        loss, norm = _optimizer_step(engine, batches, world_size, learned, to_device)
        if not loss < float("inf"):
            raise UserError(
                f"step {number + 1}: the loss is {loss}; the newest checkpoint is whole. Lower optim.lr, or look at the data"
            )
        state.step, state.tokens, state.learned_tokens = (
            number + 1,
            state.tokens + tokens,
            state.learned_tokens + learned,
        )
        seconds = time.perf_counter() - started
        yield StepMetrics(
            step=state.step,
            loss=loss,
            lr=lr,
            grad_norm=norm,
            tokens=state.tokens,
            learned_tokens=state.learned_tokens,
            tokens_per_second=tokens / seconds,
            seconds=seconds,
            extra={"skipped_steps": float(engine.skipped_steps), "data_wait_seconds": waited},
        )


def _optimizer_step(
    engine: Any,
    batches: list[PackedBatch],
    world_size: int,
    learned: int,
    to_device: Callable[[PackedBatch, torch.device], dict[str, Any]],
) -> tuple[float, float]:
    """Forward, backward and update over the step's micro-batches. Returns the loss per learned token and the gradient norm."""
    # DeepSpeed averages gradients over ranks and divides the loss by the accumulation; both are undone.
    scale = world_size * len(batches) / max(learned, 1)
    total = torch.zeros((), dtype=torch.float64, device=engine.device)
    norm = None
    for batch in batches:
        loss = engine(**to_device(batch, engine.device))
        engine.backward(loss * scale)
        norm = _replicated_grad_norm(engine)
        engine.step()
        total += loss.detach()
    dist.all_reduce(total)
    return float(total) / max(learned, 1), float(norm if norm is not None else engine.get_global_grad_norm() or 0.0)


def _replicated_grad_norm(engine: Any) -> torch.Tensor | None:
    """The norm before clipping where gradients are whole on every rank; elsewhere DeepSpeed knows it after the step."""
    if engine.zero_optimization_stage() > 0 or not engine.is_gradient_accumulation_boundary():
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else None
