"""Records where the host would wait for a GPU: reads of a tensor's values, and operators whose output has a size that
depends on values. On a CPU nothing waits, but the same lines run. `x.to(device)` is not recorded: where the CPU trains,
it says nothing of the direction."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {
    getattr(torch.Tensor, name) for name in ("item", "tolist", "cpu", "__bool__", "__int__", "__float__", "__index__")
}
_OPERATORS = {
    "aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal", "aten::_unique2",
    "aten::unique_consecutive", "aten::repeat_interleave.Tensor",
}  # fmt: skip
# By file and function: lines that run on a CPU alone.
_CPU_ONLY = {("reference.py", "_boundaries"), ("chunked.py", "_labelled_rows")}
_OURS = ("fireflyds", "fireflyds_kernels", "deepspeed")


class HostWaits:
    """Waits of the training loop in `records`: number of the step from 0, part that the loop marks, file:function."""

    def __init__(self) -> None:
        self.records: list[tuple[int, str, str]] = []
        self.step, self.part = 0, "between"
        self._reading = False

    @contextmanager
    def span(self, part: str) -> Iterator[None]:
        """Marks a part of a step, as a profiler does."""
        outer, self.part = self.part, part
        yield
        self.part = outer

    def recorded(self, steps: Iterator[Any]) -> Iterator[Any]:
        """The steps of the training loop, recorded."""
        accelerator = type(get_accelerator())
        synchronize = accelerator.synchronize  # a CPU's does nothing, a GPU's waits for all that it has to do
        while True:
            accelerator.synchronize = lambda *_: self.add()
            try:
                with _Functions(self), _Operators(self):
                    step = next(steps, None)
            finally:
                accelerator.synchronize = synchronize
            if step is None:
                return
            yield step
            self.step += 1

    def add(self) -> None:
        place = _place()
        if place is not None and place not in _CPU_ONLY:
            self.records.append((self.step, self.part, ":".join(place)))

    @contextmanager
    def one_read(self) -> Iterator[None]:
        """Keeps the operators inside of one read from being counted again."""
        outer, self._reading = self._reading, True
        yield
        self._reading = outer

    def within_read(self) -> bool:
        return self._reading


def _place() -> tuple[str, str] | None:
    """File and function of the innermost frame in our packages or in DeepSpeed; None outside of the training loop, and
    in torch.optim, whose step counts are on the host."""
    frame, place = sys._getframe(1), None
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if place is None and {"torch", "optim"} <= set(path.parts):
            return None
        if place is None and any(package in path.parts for package in _OURS):
            place = path.name, frame.f_code.co_name
        if frame.f_code.co_name == "train_steps":
            return place
        frame = frame.f_back
    return None


class _Functions(TorchFunctionMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _READS or self._waits.within_read():
            return func(*args, **kwargs)
        self._waits.add()
        with self._waits.one_read():
            return func(*args, **kwargs)


class _Operators(TorchDispatchMode):
    def __init__(self, waits: HostWaits) -> None:
        super().__init__()
        self._waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        indexes = args[1] if name in ("aten::index.Tensor", "aten::index_put_", "aten::index_put") else ()
        by_mask = any(isinstance(index, torch.Tensor) and index.dtype is torch.bool for index in indexes)
        if (name in _OPERATORS or by_mask) and not self._waits.within_read():
            self._waits.add()
        return func(*args, **(kwargs or {}))
