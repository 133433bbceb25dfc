"""What an implementation needs of a machine: rules, which return the reason why it cannot run, or None."""

import functools
import importlib
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

HALF = (torch.float16, torch.bfloat16)
HALF_OR_SINGLE = (*HALF, torch.float32)


@dataclass(frozen=True, slots=True)
class DispatchKey:
    """Properties that determine the choice. `capability` is 90 for sm_90, 0 without CUDA; `head_dim` is 0 where there
    is none."""

    device: str
    capability: int
    dtype: torch.dtype
    head_dim: int = 0
    window: bool = False
    alibi: bool = False
    softcap: bool = False
    sinks: bool = False

    def __str__(self) -> str:
        device = f"sm_{self.capability}" if self.capability else self.device
        extras = [f"head_dim {self.head_dim}"] * bool(self.head_dim) + ["window"] * self.window + ["ALiBi"] * self.alibi
        extras += ["softcap"] * self.softcap + ["sinks"] * self.sinks
        return " ".join([device, str(self.dtype).removeprefix("torch."), *extras])


def requires(
    *, capability: int = 0, dtypes: tuple[torch.dtype, ...] = (), package: str = "", function: str = ""
) -> Callable[[DispatchKey], str | None]:
    """Returns a rule: a CUDA device of at least this capability, one of these number formats, and a package that can
    be imported and has `function`."""

    def refuses(key: DispatchKey) -> str | None:
        if key.device != "cuda" or not key.capability:
            return "needs an NVIDIA GPU"
        if key.capability < capability:
            return f"needs sm_{capability} or newer"
        if dtypes and key.dtype not in dtypes:
            return f"supports {' and '.join(str(dtype).removeprefix('torch.') for dtype in dtypes)} only"
        return import_problem(package, function) if package else None

    return refuses


def requires_triton(capability: int) -> Callable[[DispatchKey], str | None]:
    """Returns a rule: Triton, on a GPU of at least this capability or in its interpreter (`TRITON_INTERPRET=1`)."""
    on_gpu = requires(capability=capability, dtypes=HALF_OR_SINGLE, package="triton", function="jit")

    def refuses(key: DispatchKey) -> str | None:
        if key.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1" and not import_problem("triton", "jit"):
            return None if key.dtype in HALF_OR_SINGLE else f"does not support {key.dtype}"
        if key.dtype is torch.bfloat16 and 0 < key.capability < 80:
            return "bfloat16 needs sm_80 or newer"  # some versions: ptxas, "Feature 'cvt.bf16.f32' requires sm_80"
        return on_gpu(key) or triton_build_problem()

    return refuses


def always(key: DispatchKey) -> str | None:
    """The rule of an implementation that runs everywhere."""
    return None


@functools.cache
def import_problem(package: str, name: str) -> str | None:
    """Imports `name` of a package. Returns why it cannot be used, None where it can.

    A package may be found and not be usable: built for another torch or CUDA, or another one of the same name
    (FlashAttention-4 installs a `flash_attn` that lacks FlashAttention-2's functions).
    """
    try:
        getattr(importlib.import_module(package), name)
    except AttributeError:
        return f"the package {package} has no {name}"
    except Exception as error:
        if isinstance(error, ModuleNotFoundError) and error.name == package:
            return f"the package {package} is not installed"
        return f"the package {package} cannot be imported ({(str(error).splitlines() or [type(error).__name__])[0]})"
    return None


@functools.cache
def triton_build_problem() -> str | None:
    """Why Triton cannot build what it loads its kernels with: on its first use it compiles a C file against Python."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None or shutil.which(compiler) is None:
        return f"Triton needs a C compiler (CC={compiler} is none)" if compiler else "Triton needs gcc, clang or CC"
    scheme = sysconfig.get_default_scheme()  # Triton reads Debian's own scheme as this one
    folder = sysconfig.get_paths(scheme="posix_prefix" if scheme == "posix_local" else scheme)["include"]
    if not (Path(folder) / "Python.h").is_file():
        return f"Triton needs Python.h in {folder} (python3-dev)"
    return None
