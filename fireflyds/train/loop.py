"""The training loop: a generator, one optimizer step per `yield`."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch
import torch.distributed as dist

from fireflyds.config import TrainConfig
from fireflyds.errors import DivergedError, UserError
from fireflyds.metrics.accumulator import MetricsContext, StepMetricsAccumulator
from fireflyds.metrics.profiler import Span
from fireflyds.optim.lr_schedule import lr_factor
from fireflyds.train.nonfinite import NonFiniteDetector, SkippedSteps
from fireflyds.train.objectives import Objective
from fireflyds.train.routing import StepRouting
from fireflyds.types import PackedBatch, StepMetrics, TrainState
from fireflyds.zero.engine import Engine, LossScaleError, loss_scale, optimizer_step, set_learning_rates


class Loader(Protocol):
    """Loads the micro-batches of this rank by the number of the optimizer step."""

    def steps(self, first: int, end: int) -> Iterator[list[PackedBatch]]:
        """Yields the micro-batches of the steps `first` to `end`, exclusive."""

    def documents(self, number: int, micro: int) -> str:
        """Describes the documents of micro-batch `micro` of step `number`, for error messages."""

    def require(self, steps: int) -> None:
        """Raises `UserError` where the data end before `steps` steps."""


@dataclass(slots=True)
class _Step:
    """One optimizer step. `num_targets`: the loss denominator, over all ranks."""

    engine: Engine
    objective: Objective
    batches: list[PackedBatch]
    num_targets: int
    detector: NonFiniteDetector
    documents: Callable[[int], str]
    """Describes the documents of a micro-batch, given its number, for error messages."""
    span: Span
    routing: StepRouting

    def run(self, accumulator: StepMetricsAccumulator, *, watching: bool) -> tuple[float, float, dict[str, float]]:
        """Runs forward, backward and update. Returns the normalized loss, the gradient norm before clipping, and the
        metrics of the routing.

        `watching`: check outputs and gradients of all modules for non-finite values.
        """
        # DeepSpeed averages gradients over ranks and divides the loss by the accumulation; this factor undoes both.
        scale = dist.get_world_size() * len(self.batches) / max(self.num_targets, 1)
        norm = 0.0
        self.routing.start_step()
        for number, batch in enumerate(self.batches):
            with self.detector.watch(number) if watching else nullcontext():
                with self.span("forward"), accumulator.time_forward():
                    inputs = batch.model_inputs(self.engine.device)
                    loss_sum, token_losses = self.engine(**inputs, compute=self.objective)
                accumulator.add_micro_batch(number, loss_sum, token_losses)
                counts = batch.num_learned, self.objective.count(batch)
                loss_sum = self.routing.with_router_losses(loss_sum, inputs["labels"][0], *counts)
                with self.span("backward"):
                    self.engine.backward(loss_sum * scale)
            if self.engine.is_gradient_accumulation_boundary():
                with self.span("optimizer"):
                    norm = self._update()
            else:
                self.engine.step()
        num_targets = max(self.num_targets, 1)
        loss = accumulator.reduce(self.routing.sums()) / num_targets
        return loss, norm, self.routing.metrics(accumulator.summed_more, num_targets)

    def _update(self) -> float:
        try:
            return optimizer_step(self.engine)
        except LossScaleError as error:
            raise DivergedError(
                "a gradient overflows float16 at the minimum loss scale; "
                f"{self.detector.report(self.documents)}. The newest checkpoint is intact",
                key="hardware.min_loss_scale",
                value=f"{loss_scale(self.engine):g}",
                remedy="Lower optim.lr, inspect that batch, or train on hardware with bf16",
            ) from error

    def non_finite_error(self, loss: float, norm: float, consecutive: int) -> DivergedError:
        """Returns the error that names the cause, found by repeating the forward passes with equal random state."""
        if not math.isfinite(loss):
            self.detector.reset()
            with torch.no_grad():
                for number, batch in enumerate(self.batches):
                    with self.detector.watch(number):
                        self.engine.module(**batch.model_inputs(self.engine.device), compute=self.objective)
        symptom = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradients' norm is {norm}"
        return DivergedError(
            f"{symptom}; non-finite steps in a row: {consecutive}; {self.detector.report(self.documents)}. These "
            "steps changed no weights and the newest checkpoint is intact",
            key="recovery.max_skipped",
            value=consecutive,
            remedy="Lower optim.lr, or inspect the data",
        )


def train_steps(
    engine: Engine,
    objective: Objective,
    loader: Loader,
    state: TrainState,
    config: TrainConfig,
    total_steps: int,
    metrics_context: MetricsContext,
    span: Span = nullcontext,
) -> Iterator[StepMetrics]:
    """Runs the steps `state.step` to `total_steps`; `state` is advanced before each yield.

    The loss of a step is the sum over all targets of all ranks and micro-batches, divided by their number: all
    batches of a step are read first, and their targets are counted over all ranks. A step whose loss or gradients are
    not finite does not update the weights and is counted as skipped. `span` marks the parts of a step in a profile.

    Raises:
        DivergedError: `max_skipped` such steps in a row, or under fp16 a non-finite gradient at the minimum loss scale;
            the message names the first non-finite tensor and the documents of its micro-batch.
    """
    engine.train()
    detector = NonFiniteDetector(engine.module)
    accumulator = StepMetricsAccumulator(metrics_context, objective.count, engine.device, total_steps)
    routing = StepRouting(engine.module.packing.routing, config.objective)
    skips = SkippedSteps(engine, config.recovery.max_skipped)
    batches_of_steps = loader.steps(state.step + state.skipped_batches, total_steps + state.skipped_batches)
    for number in range(state.step, total_steps):
        started = time.perf_counter()
        with span("data"):
            batches = next(batches_of_steps)
        data_wait = time.perf_counter() - started
        # Seeded by step and rank, so a resumed run has the same dropout masks as an uninterrupted one.
        reseed = partial(torch.manual_seed, config.seed * 1_000_003 + number * dist.get_world_size() + dist.get_rank())
        reseed()
        num_targets, tokens = accumulator.start_step(batches, data_wait)
        factor, scale = lr_factor(number, total_steps, config.optim), loss_scale(engine)
        rates = set_learning_rates(engine, factor)
        detector.reset()
        documents = partial(loader.documents, number + state.skipped_batches)
        step = _Step(engine, objective, batches, num_targets, detector, documents, span, routing)
        try:
            loss, norm, routed = step.run(accumulator, watching=skips.begin_step())
            if skips.end_step(loss):
                reseed()
                raise step.non_finite_error(loss, norm, skips.consecutive)
        except UserError as error:
            raise error.within(f"step {number + 1}") from error
        state.step, state.tokens = number + 1, state.tokens + tokens
        state.learned_tokens += accumulator.learned_tokens
        seconds = time.perf_counter() - started
        extra = {"skipped_steps": float(engine.skipped_steps)} | ({} if scale is None else {"loss_scale": scale})
        extra |= accumulator.finish_step(state.step, seconds, rates) | routed
        yield StepMetrics(
            step=state.step, loss=loss, lr=config.optim.lr * factor, grad_norm=norm, tokens=state.tokens,
            learned_tokens=state.learned_tokens, tokens_per_second=tokens / seconds, seconds=seconds, extra=extra,
        )  # fmt: skip
