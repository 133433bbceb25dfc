"""Location of the first non-finite tensor, by hooks that are registered only in steps that may end the run."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fireflyds.zero.engine import Engine, at_min_loss_scale, loss_scale


class SkippedSteps:
    """Counts consecutive steps that were skipped because their loss or gradients were not finite."""

    def __init__(self, engine: Engine, max_skipped: int) -> None:
        self._engine, self._max_skipped = engine, max_skipped
        self._before, self._scale = 0, loss_scale(engine)
        self.consecutive = 0

    def begin_step(self) -> bool:
        """Starts a step. Returns True where it may end the run and must be watched."""
        self._before, self._scale = self._engine.skipped_steps, loss_scale(self._engine)
        return at_min_loss_scale(self._engine) or 0 < self.consecutive == self._max_skipped - 1

    def end_step(self, loss: float) -> bool:
        """Ends a step. Returns True where the run must stop.

        In fp16 a skipped step with a finite loss is not counted: it is part of dynamic loss scaling.
        """
        skipped = self._engine.skipped_steps > self._before
        counts = skipped and (self._scale is None or not math.isfinite(loss))
        self.consecutive = self.consecutive + 1 if counts else 0
        return self.consecutive >= self._max_skipped


class NonFiniteDetector:
    """Checks the outputs of all modules, the gradients of these outputs and those of trainable parameters.

    Every check synchronizes with the device, so only steps that may end the run are watched.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._micro_batch = 0
        self._first: tuple[int, str] | None = None
        self._watched = False

    @contextmanager
    def watch(self, micro_batch: int) -> Iterator[None]:
        """Checks one micro-batch, counted from 0."""
        self._micro_batch, self._watched = micro_batch, True
        modules = [(name, module) for name, module in self._model.named_modules() if name]
        hooks = [module.register_forward_hook(partial(self._check_output, name)) for name, module in modules]
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                hooks.append(parameter.register_hook(partial(self._check, f"the gradient of {name}")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def reset(self) -> None:
        """Clears the result before a new step."""
        self._first, self._watched = None, False

    def report(self, documents: Callable[[int], str]) -> str:
        """Describes the first non-finite tensor over all ranks and the documents of its micro-batch. Collective."""
        gathered: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, self._first and (*self._first, documents(self._first[0])))
        candidates = [(candidate[0], rank, *candidate[1:]) for rank, candidate in enumerate(gathered) if candidate]
        if not candidates and not self._watched:
            return (
                "which tensor was the first is not known, because only a step that follows a non-finite one is "
                "watched; with recovery.max_skipped=2 it is named"
            )
        if not candidates:
            return "every output and every gradient of one micro-batch was finite, so their sum is not finite"
        batch, rank, name, document_names = min(candidates)
        return (
            f"the first non-finite tensor is {name}, in micro-batch {batch + 1} of rank {rank}, which holds "
            f"{document_names}"
        )

    def _check_output(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self._check(f"the output of {name}", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._check, f"the gradient of the output of {name}"))

    @torch.no_grad()
    def _check(self, name: str, tensor: Tensor) -> None:
        if self._first is None and not bool(tensor.isfinite().all()):
            self._first = (self._micro_batch, name)
