"""Which GPUs are there, does this torch have kernels for them, and what can they do?"""

import os
import re
import shutil
import subprocess
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from fireflyds_kernels import dispatch

from fireflyds.doctor.check import Check, failed, passed, warning
from fireflyds.models.precision import has_bf16

GIB = 1 << 30
VOLTA = 70
# Another program's share of the memory above which it is worth a word.
_TAKEN = 0.1


@dataclass(frozen=True, slots=True)
class Gpu:
    name: str
    capability: int
    """90 for sm_90."""
    memory_gib: float
    free_gib: float


@dataclass(frozen=True, slots=True)
class TorchBuild:
    version: str
    cuda: str
    """The CUDA it is built for; empty for a CPU build."""
    archs: tuple[str, ...]
    """What it has kernels for: `sm_80`, `compute_90`."""


def torch_build() -> TorchBuild:
    return TorchBuild(torch.__version__, torch.version.cuda or "", tuple(torch.cuda.get_arch_list()))


def look() -> list[Gpu]:
    found = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        capability = dispatch.capability_of(torch.device("cuda", index))
        found.append(Gpu(torch.cuda.get_device_name(index), capability, total / GIB, free / GIB))
    return found


def names() -> list[str]:
    """What this process sees, without a context on any of them, which would take memory."""
    try:
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError):
        # Counted, and yet not to be used: `look` says why.
        return []


def has_card(devices: Path) -> bool:
    """A container may be given GPU 3 alone."""
    return any(devices.glob("nvidia[0-9]*"))


def check_all(ranks_here: int) -> list[Check]:
    build, found = torch_build(), look()
    if not found:
        card, visible = has_card(Path("/dev")), os.environ.get("CUDA_VISIBLE_DEVICES")
        return [check_none(build, card, visible, _why_none()), _build_tools("")]
    checks = [check_gpus(found, ranks_here), check_kernels_for(build, found), check_ability(found)]
    if (spec := find_spec("bitsandbytes")) is not None and spec.submodule_search_locations:
        files = [file.name for file in Path(spec.submodule_search_locations[0]).glob("libbitsandbytes_*")]
        checks.append(check_bitsandbytes(files, build.cuda))
    return [*checks, _build_tools(build.cuda)]


def check_none(build: TorchBuild, card: bool, visible: str | None, why: str) -> Check:
    """No GPU is seen: because there is none, or because something stands before it."""
    if not card:
        return passed("gpus", f"none; training runs on the CPU (torch {build.version})")
    if not build.cuda:
        remedy = "install torch with CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu126"
        return failed("gpus", f"there is an NVIDIA GPU, but torch {build.version} is a CPU build", remedy)
    if visible is not None:
        remedy = "unset CUDA_VISIBLE_DEVICES, or name the GPUs in it that are to be used"
        return warning("gpus", f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs of this machine", remedy)
    remedy = (
        f"update the NVIDIA driver to one for CUDA {build.cuda}, or install a torch for an older CUDA; see nvidia-smi"
    )
    return failed("gpus", f"there is an NVIDIA GPU, but torch {build.version} cannot use it: {why}", remedy)


def check_gpus(gpus: list[Gpu], ranks_here: int) -> Check:
    kinds = {gpu.name: sum(other.name == gpu.name for other in gpus) for gpu in gpus}
    about = ", ".join(f"{count} x {name}" for name, count in kinds.items())
    about += f", {min(gpu.memory_gib for gpu in gpus):.0f} GiB, {min(gpu.free_gib for gpu in gpus):.0f} GiB free"
    if ranks_here > len(gpus):
        return failed("gpus", f"{about}: {ranks_here} ranks here", f"start {len(gpus)} ranks on this host")
    if len(kinds) > 1:
        return warning(
            "gpus", f"{about}: of several kinds", "the slowest sets the pace: choose with CUDA_VISIBLE_DEVICES"
        )
    if taken := [i for i, gpu in enumerate(gpus) if gpu.free_gib < (1 - _TAKEN) * gpu.memory_gib]:
        remedy = "see nvidia-smi and end what is left over, or choose other GPUs with CUDA_VISIBLE_DEVICES"
        return warning("gpus", f"{about}: other programs hold memory of GPU {', '.join(map(str, taken))}", remedy)
    return passed("gpus", about)


def check_same(seen: list[list[str]], hosts: list[str]) -> Check:
    """Names of the GPUs that each rank sees, and `hosts`, by rank."""
    blind = [rank for rank, of_rank in enumerate(seen) if not of_rank]
    number = len(set(hosts))
    if len(blind) == len(seen):
        return passed("same gpus", f"none on any of the {number} hosts")
    if blind:
        where = ", ".join(dict.fromkeys(hosts[rank] for rank in blind))
        remedy = (
            "see nvidia-smi and dmesg there; for Slurm give --gpus-per-node, for containers --gpus, else leave it out"
        )
        return failed(
            "same gpus", f"none for rank {', '.join(map(str, blind[:8]))} on {where}, others have them", remedy
        )
    kinds: dict[str, list[str]] = {}
    for host, of_rank in zip(hosts, seen, strict=True):
        for name in of_rank:
            kinds.setdefault(name, []).append(host)
    told = []
    for name, with_it in kinds.items():
        of = list(dict.fromkeys(with_it))
        told.append(f"{name} on {of[0]}{f' and {len(of) - 1} more' * (len(of) > 1)}")
    if len(kinds) > 1:
        remedy = "set hardware.precision yourself, each rank would choose by its own GPU; the slowest sets the pace"
        return warning("same gpus", ", ".join(told), remedy)
    return passed("same gpus", f"{next(iter(kinds))} on all {number} hosts")


def has_kernels(capability: int, archs: tuple[str, ...]) -> bool:
    """Machine code serves its own major version from its minor on; PTX (`compute_`) everything newer."""
    for arch in archs:
        found = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", arch)
        if found is None:
            continue
        number = int(found[2])
        if number == capability or (
            number < capability and not found[3] and (found[1] == "compute" or number // 10 == capability // 10)
        ):
            return True
    return False


def check_kernels_for(build: TorchBuild, gpus: list[Gpu]) -> Check:
    """CUDA 13 and torch's wheels for it have nothing older than Turing; torch 2.15 has no wheel left that does."""
    lacking = sorted({gpu.capability for gpu in gpus if not has_kernels(gpu.capability, build.archs)})
    about = f"torch {build.version} for CUDA {build.cuda}"
    if not lacking:
        return passed("torch's kernels", f"{about} has them for every GPU here")
    remedy = "install a torch whose torch.cuda.get_arch_list() has them"
    if lacking[0] < 75:
        remedy = (
            "pip install 'torch<=2.14' --index-url https://download.pytorch.org/whl/cu126: from torch 2.11 on only the "
            "cu126 wheels have kernels for Volta (V100), and from 2.15 on none"
        )
    names = ", ".join(f"sm_{capability}" for capability in lacking)
    return failed("torch's kernels", f"{about} has none for {names}, only {', '.join(build.archs)}", remedy)


def check_ability(gpus: list[Gpu]) -> Check:
    """Number formats and attention of the least GPU."""
    least = min(gpu.capability for gpu in gpus)
    dtype = torch.bfloat16 if has_bf16(least) else torch.float16
    attention = dispatch.runnable("packed_attention", dispatch.DispatchKey("cuda", least, dtype, 128))[0]
    if has_bf16(least):
        return passed("capability", f"sm_{least}: bf16 and FlashAttention-2; packed attention runs on {attention}")
    remedy = (
        "nothing to mend: hardware.precision=auto takes fp16 here. Start with hardware.initial_scale_power from 12 to 16 "
        "and watch loss_scale; models trained in bf16 (LLaMA-2-7B) may overflow in fp16, so prefer tuning=lora or qlora. "
        "Do not force Triton's matrix kernels: below sm_80 they run without tensor cores"
    )
    return warning(
        "capability", f"sm_{least}: no bf16, no FlashAttention-2; packed attention runs on {attention}", remedy
    )


def check_bitsandbytes(files: list[str], cuda: str) -> Check:
    """Its wheel carries a library for every CUDA it knows, and loads none of another major version."""
    wanted = "".join(cuda.split(".")[:2])
    there = sorted(found[1] for file in files if (found := re.match(r"libbitsandbytes_cuda(\d+)", file)))
    if wanted in there:
        return passed("bitsandbytes", f"has its library for CUDA {cuda}")
    near = [number for number in there if number[:2] == wanted[:2]]
    if near:
        remedy = f"should QLoRA or 8-bit AdamW not start: pip install -U bitsandbytes, or BNB_CUDA_VERSION={near[-1]}"
        return warning("bitsandbytes", f"no library for CUDA {cuda}, but near ones: {', '.join(near)}", remedy)
    remedy = "pip install -U bitsandbytes; until then tuning=qlora and optim.name=paged_adamw_32bit or adamw_8bit fail"
    return failed(
        "bitsandbytes", f"no library for CUDA {cuda}: {', '.join(there) or 'a build for the CPU alone'}", remedy
    )


def check_build_tools(cuda: str, ninja: bool, compiler: bool, nvcc: str | None) -> Check:
    """DeepSpeed compiles its CPU Adam when it is first used: with the nvcc of torch's own CUDA, or any of CUDA 12 for
    12.x. `cuda` is empty where there is no GPU, and no nvcc is needed."""
    missing = [name for name, there in (("ninja", ninja), ("a C++ compiler", compiler)) if not there]
    missing += ["nvcc"] if cuda and nvcc is None else []
    wanted = ".".join(cuda.split(".")[:2])
    fits = not cuda or nvcc == wanted or (str(nvcc).startswith("12.") and wanted.startswith("12."))
    if not missing and fits:
        with_nvcc = f" and nvcc {nvcc}" if cuda else ""
        return passed("build tools", f"ninja, a C++ compiler{with_nvcc}: DeepSpeed's CPU Adam can be built")
    found = f"missing: {', '.join(missing)}" if missing else f"nvcc {nvcc}, but torch is for CUDA {cuda}"
    toolkit = f", the CUDA toolkit {wanted} with CUDA_HOME set to it" if cuda else ""
    remedy = f"only zero.offload_optimizer=cpu needs them: ninja on the PATH (activate the venv), g++{toolkit}"
    return warning("build tools", found, remedy)


def _build_tools(cuda: str) -> Check:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    return check_build_tools(cuda, shutil.which("ninja") is not None, compiler is not None, _nvcc_version())


def _nvcc_version() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    # In torch's order: the variable, the PATH, the usual place.
    places = [f"{home}/bin"] if home else [None, "/usr/local/cuda/bin"]
    nvcc = next(filter(None, (shutil.which("nvcc", path=place) for place in places)), None)
    if nvcc is None:
        return None
    told = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    found = re.search(r"release (\d+\.\d+)", told)
    return found[1] if found else None


def _why_none() -> str:
    if not torch.version.cuda:
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "torch counts no devices"
