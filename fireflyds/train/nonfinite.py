"""Which tensor stopped being finite first: watched while a step may fail, named when it does."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fireflyds.zero.engine import Engine, at_least_scale, loss_scale


class SkippedSteps:
    """Counts steps in a row that changed nothing because their loss or gradients were not finite."""

    def __init__(self, engine: Engine, most: int) -> None:
        self._engine, self._most = engine, most
        self._before, self._scale = 0, loss_scale(engine)
        self.in_row = 0

    def begin_step(self) -> bool:
        """A step begins. Whether it may end the run, and is to be watched."""
        self._before, self._scale = self._engine.skipped_steps, loss_scale(self._engine)
        return at_least_scale(self._engine) or 0 < self.in_row == self._most - 1

    def end_step(self, loss: float) -> bool:
        """The step is over. In fp16 a skipped step with a finite loss is how the loss scale finds its place."""
        skipped = self._engine.skipped_steps > self._before
        counts = skipped and (self._scale is None or not math.isfinite(loss))
        self.in_row = self.in_row + 1 if counts else 0
        return self.in_row >= self._most


class NonFiniteDetector:
    """Looks at every module's output, at the gradient that comes back to it, and at those of what trains. Costs a wait for the device each, so
    only steps that may end the run are watched."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._micro_batch = 0
        self._first: tuple[int, str] | None = None
        self._looked = False

    @contextmanager
    def watch(self, micro_batch: int) -> Iterator[None]:
        """Watch one micro-batch, counted from 0."""
        self._micro_batch, self._looked = micro_batch, True
        named = [(name, module) for name, module in self._model.named_modules() if name]
        hooks = [module.register_forward_hook(partial(self._see, name)) for name, module in named]
        for name, parameter in self._model.named_parameters():
            if parameter.requires_grad:
                hooks.append(parameter.register_hook(partial(self._check, f"the gradient of {name}")))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def reset(self) -> None:
        """Begin a new step."""
        self._first, self._looked = None, False

    def report(self, documents: Callable[[int], str]) -> str:
        """The first tensor of all ranks, in words, and the documents of its micro-batch. Every rank calls this."""
        found: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(found, self._first and (*self._first, documents(self._first[0])))
        firsts = [(first[0], rank, *first[1:]) for rank, first in enumerate(found) if first]
        if not firsts and not self._looked:
            return (
                "which tensor was the first is not known, because only a step that follows one that was not finite is watched; with "
                "recovery.max_skipped=2 it is named"
            )
        if not firsts:
            return "every output and every gradient of one micro-batch was finite, so it is their sum that is not"
        batch, rank, name, held = min(firsts)
        return f"the first tensor that is not finite is {name}, in micro-batch {batch + 1} of rank {rank}, which holds {held}"

    def _see(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        for tensor in output if isinstance(output, tuple | list) else (output,):
            if isinstance(tensor, Tensor) and tensor.is_floating_point():
                self._check(f"the output of {name}", tensor)
                if tensor.requires_grad:
                    tensor.register_hook(partial(self._check, f"the gradient of the output of {name}"))

    @torch.no_grad()
    def _check(self, name: str, tensor: Tensor) -> None:
        if self._first is None and not bool(tensor.isfinite().all()):
            self._first = (self._micro_batch, name)
