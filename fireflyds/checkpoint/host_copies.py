"""Copies of device tensors in host memory, through two pinned buffers.

A copy from a GPU into ordinary memory runs at a few GB/s; one into pinned memory several times as fast. Pinned copies
of whole tensors would take up to twice their size, since torch rounds pinned allocations up to powers of two.
"""

from typing import Any

import torch
from torch import Tensor

BUFFER_BYTES = 128 << 20


class HostCopier:
    """Copies tensors to host memory piece by piece: while one piece is on its way into the first buffer, the piece
    before is copied out of the second."""

    def __init__(self, buffer_bytes: int = BUFFER_BYTES) -> None:
        self._buffer_bytes = buffer_bytes
        self._buffers: list[Tensor] = []

    def copy(self, tensor: Tensor) -> Tensor:
        """Returns a copy `[numel]` of a contiguous tensor in host memory that shares no memory with it. It is complete
        when this returns."""
        source = tensor.detach().reshape(-1)
        if source.device.type == "cpu":
            return source.clone()
        return self.copy_in_pieces(source, pinned=source.device.type == "cuda")

    def copy_in_pieces(self, source: Tensor, *, pinned: bool) -> Tensor:
        """The copy through the buffers, which are in pinned memory unless there is no GPU to pin it for."""
        if not self._buffers:
            self._buffers = [torch.empty(self._buffer_bytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(2)]
        target = torch.empty(source.shape, dtype=source.dtype)
        step = self._buffer_bytes // source.itemsize
        waiting: tuple[Tensor, Tensor, Any] | None = None
        for number, start in enumerate(range(0, source.numel(), step)):
            piece = source[start : start + step]
            buffer = self._buffers[number % 2][: piece.numel() * piece.itemsize].view(piece.dtype)
            buffer.copy_(piece, non_blocking=True)
            event = _record() if pinned else None
            if waiting is not None:
                _finish(*waiting)
            waiting = (target[start : start + step], buffer, event)
        if waiting is not None:
            _finish(*waiting)
        return target


def _record() -> Any:
    event = torch.cuda.Event()
    event.record()
    return event


def _finish(target: Tensor, buffer: Tensor, event: Any) -> None:
    if event is not None:
        event.synchronize()
    target.copy_(buffer)
