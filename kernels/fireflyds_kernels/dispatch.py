"""Selects the implementation of a kernel by device, number format and options.

Each kernel lists its implementations in order of preference; each implementation returns the reason why it cannot run,
or None. `FIREFLYDS_KERNELS` and `force` select an implementation by name instead; if it cannot run, there is an error
and no fallback.

    FIREFLYDS_KERNELS=triton                        every kernel that has an implementation of that name
    FIREFLYDS_KERNELS=packed_attention=triton,rope=reference
"""

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fireflyds_kernels.requirements import HALF_OR_SINGLE, DispatchKey

VARIABLE = "FIREFLYDS_KERNELS"
_KERNELS: dict[str, "Kernel"] = {}
_forced: list[str] = []
_loaded: dict[str, Callable[..., Any]] = {}


class CannotRunError(RuntimeError):
    """An implementation was selected by name and cannot run here, or no implementation has that name."""


@dataclass(frozen=True, slots=True)
class Implementation:
    """One implementation of a kernel: `function` of `module`, imported when first selected."""

    name: str
    module: str
    function: str
    refuses: Callable[[DispatchKey], str | None]

    def load(self) -> Callable[..., Any]:
        """Imports the module and returns the function."""
        function: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return function


class Kernel:
    """The implementations of a kernel, in order of preference."""

    def __init__(self, name: str, *implementations: Implementation) -> None:
        self.name = name
        self.implementations = {implementation.name: implementation for implementation in implementations}
        _KERNELS[name] = self

    def refusals(self, key: DispatchKey) -> dict[str, str | None]:
        """For every implementation the reason why it cannot run, None for those that can."""
        return {name: implementation.refuses(key) for name, implementation in self.implementations.items()}

    def choose(self, key: DispatchKey) -> str:
        """The name of the implementation that runs.

        Raises:
            CannotRunError: an implementation was forced that cannot run here.
        """
        name = _forced_for(self)
        if name is None:
            return runnable(self.name, key)[0]
        refusal = self.implementations[name].refuses(key)
        if refusal:
            raise CannotRunError(
                f"{self.name} was forced to run {name!r} on {key}, which is not possible: {refusal}. Available here: "
                f"{', '.join(runnable(self.name, key))}; set {VARIABLE} or force() to one of them, or leave the "
                "choice to the kernel"
            )
        return name


def _settings() -> tuple[str, ...]:
    """The forced settings, from the outermost on."""
    return (os.environ.get(VARIABLE, ""), *_forced)


def _forced_for(kernel: Kernel) -> str | None:
    forced_name = None
    for setting in _settings():
        for entry in filter(None, map(str.strip, setting.split(","))):
            owner, _, name = entry.rpartition("=")
            _check_name(owner, name)
            if owner == kernel.name or (not owner and name in kernel.implementations):
                forced_name = name
    return forced_name


def _check_name(owner: str, name: str) -> None:
    if owner and owner not in _KERNELS:
        raise CannotRunError(f"{VARIABLE}: no kernel is called {owner!r}. Known: {', '.join(sorted(_KERNELS))}")
    names = {
        implementation
        for kernel in ([_KERNELS[owner]] if owner else _KERNELS.values())
        for implementation in kernel.implementations
    }
    if name not in names:
        raise CannotRunError(
            f"{VARIABLE}: no implementation of {owner or 'any kernel'} is called {name!r}. Known: "
            f"{', '.join(sorted(names))}"
        )


@contextmanager
def force(everywhere: str | None = None, **kernels: str) -> Iterator[None]:
    """Context manager in which kernels run the named implementation: `force("reference")`, `force(rope="triton")`.

    Functions that torch.compile compiled before keep the choice they were compiled with.

    Raises:
        CannotRunError: no kernel or implementation has that name.
    """
    setting = ",".join([*filter(None, [everywhere]), *(f"{kernel}={name}" for kernel, name in kernels.items())])
    for entry in filter(None, setting.split(",")):
        owner, _, name = entry.rpartition("=")
        _check_name(owner, name)
    _forced.append(setting)
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def capability_of(device: torch.device) -> int:
    """The compute capability as an integer, 90 for sm_90; 0 for devices other than NVIDIA GPUs."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator that launches Triton kernels on the GPU of the first argument, whichever device is current."""

    @functools.wraps(function)
    def wrapper(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        with torch.cuda.device_of(tensor):
            return function(tensor, *arguments, **options)

    return wrapper


@functools.cache
def processors(device: torch.device) -> int:
    """Number of streaming multiprocessors of a GPU; 2 for other devices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _select(kernel: str, device: torch.device, dtype: torch.dtype, options: tuple[tuple[str, int], ...]) -> str:
    return _resolve(kernel, device, dtype, options, _settings())


@functools.cache
def _resolve(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    options: tuple[tuple[str, int], ...],
    settings: tuple[str, ...],
) -> str:
    key = DispatchKey(device.type, capability_of(device), dtype, **dict(options))  # type: ignore[arg-type]
    name = _KERNELS[kernel].choose(key)
    _loaded[f"{kernel}.{name}"] = _KERNELS[kernel].implementations[name].load()
    return f"{kernel}.{name}"


def select(kernel: str, tensor: Tensor, **options: int) -> Callable[..., Any]:
    """The function that computes `kernel` for tensors like this one. torch.compile treats the choice as a constant.

    `options`: further fields of the dispatch key.
    """
    return _loaded[_select(kernel, tensor.device, tensor.dtype, tuple(options.items()))]


def runnable(kernel: str, key: DispatchKey) -> list[str]:
    """The implementations that run for `key`, in order of preference. Triton's interpreter, on the CPU, is not one of
    them: it runs only when named."""
    skipped = "triton" if key.device == "cpu" else None
    return [name for name, reason in _KERNELS[kernel].refusals(key).items() if reason is None and name != skipped]


def refusals(kernel: str, key: DispatchKey) -> dict[str, str | None]:
    """For every implementation the reason why it cannot run for `key`, None for those that can."""
    return _KERNELS[kernel].refusals(key)


def describe() -> str:
    """A table of the implementations selected on this machine's devices by number format, with the reasons against
    preferred ones."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] + [torch.device("cpu")]
    lines = []
    for device in devices:
        capability = capability_of(device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        lines.append(name + (f" (sm_{capability})" if capability else ""))
        for kernel in _KERNELS.values():
            for dtype in HALF_OR_SINGLE:
                key = DispatchKey(device.type, capability, dtype, 128 if kernel.name == "packed_attention" else 0)
                chosen, reason = _explain(kernel, key)
                dtype_name = str(dtype).removeprefix("torch.")
                lines.append(f"  {kernel.name:<21}{dtype_name:<9} {chosen:<13} {reason}".rstrip())
    return "\n".join(lines)


def _explain(kernel: Kernel, key: DispatchKey) -> tuple[str, str]:
    """The selected implementation, and the reasons against those preferred to it."""
    try:
        chosen = kernel.choose(key)
    except CannotRunError as error:
        return "none", str(error)
    if _forced_for(kernel):
        return chosen, "forced"
    refusals = kernel.refusals(key)
    preferred = list(refusals)[: list(refusals).index(chosen)]
    return chosen, "; ".join(f"{name} {refusals[name] or 'runs here only when named'}" for name in preferred)
