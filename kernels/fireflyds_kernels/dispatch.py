"""Which implementation of a kernel runs here, and why: by device, number format and what is asked of it.

Each kernel lists its implementations in order of preference; each implementation says why it cannot run, or None.
`FIREFLYDS_KERNELS` and `force` name one instead, and a named one that cannot run is refused, never replaced.

    FIREFLYDS_KERNELS=triton                        every kernel that has an implementation of that name
    FIREFLYDS_KERNELS=packed_attention=triton,rope=reference
"""

import functools
import importlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

VARIABLE = "FIREFLYDS_KERNELS"
_KERNELS: dict[str, "Kernel"] = {}
_forced: list[str] = []
_loaded: dict[str, Callable[..., Any]] = {}


class CannotRunError(RuntimeError):
    """An implementation was asked for by name and cannot run here, or nothing of that name exists."""


@dataclass(frozen=True, slots=True)
class DispatchKey:
    """What a choice depends on. `capability` is 90 for sm_90, 0 off CUDA; `head_dim` 0 where there is none."""

    device: str
    capability: int
    dtype: torch.dtype
    head_dim: int = 0
    window: bool = False
    alibi: bool = False

    def __str__(self) -> str:
        device = f"sm_{self.capability}" if self.capability else self.device
        extras = [f"head_dim {self.head_dim}"] * bool(self.head_dim) + ["window"] * self.window + ["ALiBi"] * self.alibi
        return " ".join([device, str(self.dtype).removeprefix("torch."), *extras])


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute a kernel: `function` of `module`, imported when first chosen."""

    name: str
    module: str
    function: str
    refuses: Callable[[DispatchKey], str | None]

    def load(self) -> Callable[..., Any]:
        found: Callable[..., Any] = getattr(importlib.import_module(self.module), self.function)
        return found


class Kernel:
    """A kernel's implementations, best first."""

    def __init__(self, name: str, *implementations: Implementation) -> None:
        self.name = name
        self.implementations = {each.name: each for each in implementations}
        _KERNELS[name] = self

    def refusals(self, where: DispatchKey) -> dict[str, str | None]:
        """Every implementation with why it cannot run, None for those that can."""
        return {name: each.refuses(where) for name, each in self.implementations.items()}

    def choose(self, where: DispatchKey) -> str:
        """The name of the implementation that runs.

        Raises:
            CannotRunError: one was forced that cannot run here.
        """
        name = _forced_for(self)
        if name is None:
            return runnable(self.name, where)[0]
        refusal = self.implementations[name].refuses(where)
        if refusal:
            raise CannotRunError(
                f"{self.name} was told to run {name!r} on {where}, which it cannot: {refusal}. "
                f"Able here: {', '.join(runnable(self.name, where))}; set {VARIABLE} or force() to one of them, or leave the choice to the kernel"
            )
        return name


def _settings() -> tuple[str, ...]:
    """What is forced, from the outermost on."""
    return (os.environ.get(VARIABLE, ""), *_forced)


def _forced_for(kernel: Kernel) -> str | None:
    found = None
    for setting in _settings():
        for part in filter(None, map(str.strip, setting.split(","))):
            owner, _, name = part.rpartition("=")
            _check(owner, name)
            if owner == kernel.name or (not owner and name in kernel.implementations):
                found = name
    return found


def _check(owner: str, name: str) -> None:
    if owner and owner not in _KERNELS:
        raise CannotRunError(f"{VARIABLE}: no kernel is called {owner!r}. Known: {', '.join(sorted(_KERNELS))}")
    known = {each for kernel in ([_KERNELS[owner]] if owner else _KERNELS.values()) for each in kernel.implementations}
    if name not in known:
        raise CannotRunError(
            f"{VARIABLE}: no implementation of {owner or 'any kernel'} is called {name!r}. Known: {', '.join(sorted(known))}"
        )


@contextmanager
def force(everywhere: str | None = None, **kernels: str) -> Iterator[None]:
    """Inside, kernels run the implementation named: `force("reference")`, `force(packed_attention="triton")`.

    What torch.compile compiled before keeps the choice it was compiled with.

    Raises:
        CannotRunError: nothing of that name exists.
    """
    setting = ",".join([*filter(None, [everywhere]), *(f"{kernel}={name}" for kernel, name in kernels.items())])
    for part in filter(None, setting.split(",")):
        owner, _, name = part.rpartition("=")
        _check(owner, name)
    _forced.append(setting)
    try:
        yield
    finally:
        _forced.pop()


@functools.cache
def capability_of(device: torch.device) -> int:
    """90 for sm_90; 0 for what is no NVIDIA GPU."""
    if device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def on_its_device(function: Callable[..., Any]) -> Callable[..., Any]:
    """Launch Triton's kernels on the GPU of the first tensor, whichever one is current."""

    @functools.wraps(function)
    def guarded(first: Tensor, *rest: Any, **options: Any) -> Any:
        with torch.cuda.device_of(first):
            return function(first, *rest, **options)

    return guarded


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a GPU; 2 elsewhere."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _select(kernel: str, device: torch.device, dtype: torch.dtype, head_dim: int, window: bool, alibi: bool) -> str:
    return _decide(kernel, device, dtype, head_dim, window, alibi, _settings())


@functools.cache
def _decide(
    kernel: str,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    window: bool,
    alibi: bool,
    settings: tuple[str, ...],
) -> str:
    name = _KERNELS[kernel].choose(DispatchKey(device.type, capability_of(device), dtype, head_dim, window, alibi))
    _loaded[f"{kernel}.{name}"] = _KERNELS[kernel].implementations[name].load()
    return f"{kernel}.{name}"


def select(
    kernel: str, tensor: Tensor, *, head_dim: int = 0, window: bool = False, alibi: bool = False
) -> Callable[..., Any]:
    """The function that computes `kernel` for tensors like this one. torch.compile takes the choice as a constant."""
    return _loaded[_select(kernel, tensor.device, tensor.dtype, head_dim, window, alibi)]


def requires(
    *, capability: int = 0, dtypes: tuple[torch.dtype, ...] = (), package: str = ""
) -> Callable[[DispatchKey], str | None]:
    """A rule: a CUDA device of at least this capability, one of these number formats, a package that is installed."""

    def refuses(where: DispatchKey) -> str | None:
        if where.device != "cuda" or not where.capability:
            return "needs an NVIDIA GPU"
        if where.capability < capability:
            return f"needs sm_{capability} or newer"
        if dtypes and where.dtype not in dtypes:
            return f"takes {' and '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} only"
        if package and not installed(package):
            return f"the package {package} is not installed"
        return None

    return refuses


def requires_triton(capability: int) -> Callable[[DispatchKey], str | None]:
    """A rule: Triton, on a GPU of at least this capability or in its interpreter (`TRITON_INTERPRET=1`)."""
    on_gpu = requires(capability=capability, dtypes=HALF_OR_SINGLE, package="triton")

    def refuses(where: DispatchKey) -> str | None:
        if where.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and installed("triton"):
            return None if where.dtype in HALF_OR_SINGLE else f"does not take {where.dtype}"
        return on_gpu(where)

    return refuses


HALF = (torch.float16, torch.bfloat16)
HALF_OR_SINGLE = (*HALF, torch.float32)


def always(where: DispatchKey) -> str | None:
    """The rule of an implementation that runs everywhere."""
    return None


@functools.cache
def installed(package: str) -> bool:
    """Whether a package is there to import, without importing it."""
    return find_spec(package) is not None


def runnable(kernel: str, where: DispatchKey) -> list[str]:
    """The implementations that run there, best first. Triton's interpreter, on the CPU, runs only when named."""
    skipped = "triton" if where.device == "cpu" else None
    return [name for name, why in _KERNELS[kernel].refusals(where).items() if why is None and name != skipped]


def refusals(kernel: str, where: DispatchKey) -> dict[str, str | None]:
    """Every implementation with why it cannot run there, None for those that can."""
    return _KERNELS[kernel].refusals(where)


def describe() -> str:
    """A table of what runs on this machine's devices, by number format, and why better ones do not."""
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())] + [torch.device("cpu")]
    lines = []
    for device in devices:
        capability = capability_of(device)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        lines.append(name + (f" (sm_{capability})" if capability else ""))
        for kernel in _KERNELS.values():
            for dtype in HALF_OR_SINGLE:
                where = DispatchKey(device.type, capability, dtype, 128 if kernel.name == "packed_attention" else 0)
                chosen, why = _explain(kernel, where)
                kind = str(dtype).removeprefix("torch.")
                lines.append(f"  {kernel.name:<21}{kind:<9} {chosen:<13} {why}".rstrip())
    return "\n".join(lines)


def _explain(kernel: Kernel, where: DispatchKey) -> tuple[str, str]:
    """What runs, and what is said of those that would be better."""
    try:
        chosen = kernel.choose(where)
    except CannotRunError as refusal:
        return "none", str(refusal)
    if _forced_for(kernel):
        return chosen, "as told"
    refusals = kernel.refusals(where)
    better = list(refusals)[: list(refusals).index(chosen)]
    return chosen, "; ".join(f"{name} {refusals[name] or 'runs here only when named'}" for name in better)
