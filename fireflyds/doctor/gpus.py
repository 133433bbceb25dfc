"""Checks of the GPUs: availability, kernels of the installed torch, number formats and build tools."""

import os
import re
import shutil
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from fireflyds_kernels import dispatch
from fireflyds_kernels.requirements import DispatchKey, triton_build_problem

from fireflyds.distributed.host_identity import local_world_size
from fireflyds.doctor.check import Check, failed, passed, warning
from fireflyds.models.precision import has_bf16

GIB = 1 << 30
# Share of GPU memory used by other processes above which a warning is issued.
_MAX_SHARE_IN_USE = 0.1


@dataclass(frozen=True, slots=True)
class Gpu:
    """Name, compute capability and memory of a visible GPU."""

    name: str
    capability: int
    """90 for sm_90."""
    memory_gib: float
    free_gib: float


@dataclass(frozen=True, slots=True)
class TorchBuild:
    """Version of torch, and the CUDA version and GPU architectures it was built for."""

    version: str
    cuda: str
    """CUDA version it is built for; empty for a CPU build."""
    archs: tuple[str, ...]
    """Architectures it has kernels for, such as `sm_80` or `compute_90`."""


def torch_build() -> TorchBuild:
    """The installed build of torch."""
    return TorchBuild(torch.__version__, torch.version.cuda or "", tuple(torch.cuda.get_arch_list()))


def look() -> list[Gpu]:
    """The GPUs visible to this process, with their total and free memory in GiB."""
    gpus = []
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        free, total = torch.cuda.mem_get_info(index)
        capability = dispatch.capability_of(torch.device("cuda", index))
        gpus.append(Gpu(torch.cuda.get_device_name(index), capability, total / GIB, free / GIB))
    return gpus


def names() -> list[str]:
    """Names of the visible GPUs, read without creating a CUDA context, which would allocate memory."""
    try:
        return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    except (RuntimeError, AssertionError):
        # Counted, but not usable: `check_all` reports the reason.
        return []


def has_card(devices: Path) -> bool:
    """True where a GPU has a device file, of any index: a container may have only GPU 3."""
    return any(devices.glob("nvidia[0-9]*"))


def check_all(ranks_here: int) -> list[Check]:
    """All checks of GPUs and of the libraries built for them; `ranks_here`: number of ranks on this host."""
    build, visible_gpus = torch_build(), look()
    if not visible_gpus:
        card_exists, visible_devices = has_card(Path("/dev")), os.environ.get("CUDA_VISIBLE_DEVICES")
        return [check_none(build, card_exists, visible_devices, _cuda_error()), _build_tools(on_gpu=False)]
    checks = [check_gpus(visible_gpus, ranks_here), check_kernels_for(build, visible_gpus), check_ability(visible_gpus)]
    if (spec := find_spec("bitsandbytes")) is not None and spec.submodule_search_locations:
        files = [file.name for file in Path(spec.submodule_search_locations[0]).glob("libbitsandbytes_*")]
        checks.append(check_bitsandbytes(files, build.cuda))
    return [*checks, _build_tools(on_gpu=True)]


def check_none(build: TorchBuild, card: bool, visible: str | None, why: str) -> Check:
    """Explains why torch sees no GPU: none exists, or the torch build, a variable or the driver prevents its use."""
    if not card:
        return passed("gpus", f"none; training runs on the CPU (torch {build.version})")
    if not build.cuda:
        remedy = "install torch with CUDA: pip install torch --index-url https://download.pytorch.org/whl/cu126"
        return failed("gpus", f"there is an NVIDIA GPU, but torch {build.version} is a CPU build", remedy)
    if visible is not None:
        remedy = "unset CUDA_VISIBLE_DEVICES, or set it to the GPUs to use"
        return warning("gpus", f"CUDA_VISIBLE_DEVICES={visible!r} hides the GPUs of this machine", remedy)
    remedy = (
        f"update the NVIDIA driver to one for CUDA {build.cuda}, or install a torch for an older CUDA; see nvidia-smi"
    )
    return failed("gpus", f"there is an NVIDIA GPU, but torch {build.version} cannot use it: {why}", remedy)


def check_gpus(gpus: list[Gpu], ranks_here: int) -> Check:
    """Compares the number of ranks on this host with its GPUs, and these with each other."""
    counts = {gpu.name: sum(other.name == gpu.name for other in gpus) for gpu in gpus}
    summary = ", ".join(f"{count} x {name}" for name, count in counts.items())
    summary += f", {min(gpu.memory_gib for gpu in gpus):.0f} GiB, {min(gpu.free_gib for gpu in gpus):.0f} GiB free"
    # A wrapper of Slurm or mpirun may show each rank its own GPU alone, as `zero.engine.assign_device` takes it.
    one_each = len(gpus) == 1 and not local_world_size()
    if one_each and ranks_here > 1:
        summary += f", one visible to each of {ranks_here} ranks"
    elif ranks_here > len(gpus):
        return failed("gpus", f"{summary}: {ranks_here} ranks on this host", f"start {len(gpus)} ranks on this host")
    if len(counts) > 1:
        return warning(
            "gpus", f"{summary}: different models", "the slowest GPU limits the speed: use CUDA_VISIBLE_DEVICES"
        )
    if occupied := [i for i, gpu in enumerate(gpus) if gpu.free_gib < (1 - _MAX_SHARE_IN_USE) * gpu.memory_gib]:
        remedy = "see nvidia-smi and end leftover processes, or select other GPUs with CUDA_VISIBLE_DEVICES"
        return warning("gpus", f"{summary}: other processes use memory of GPU {', '.join(map(str, occupied))}", remedy)
    return passed("gpus", summary)


def check_same(seen: list[list[str]], hosts: list[str]) -> Check:
    """Compares the GPUs of all hosts. `seen`: names of the GPUs visible to each rank; `hosts`: by rank."""
    without_gpu = [rank for rank, rank_gpus in enumerate(seen) if not rank_gpus]
    num_hosts = len(set(hosts))
    if len(without_gpu) == len(seen):
        return passed("same gpus", f"none on any of the {num_hosts} hosts")
    if without_gpu:
        host_names = ", ".join(dict.fromkeys(hosts[rank] for rank in without_gpu))
        remedy = (
            "see nvidia-smi and dmesg on it; for Slurm give --gpus-per-node, for containers --gpus, or exclude the host"
        )
        return failed(
            "same gpus",
            f"none for rank {', '.join(map(str, without_gpu[:8]))} on {host_names}, but other ranks have GPUs",
            remedy,
        )
    hosts_by_model: dict[str, list[str]] = {}
    for host, rank_gpus in zip(hosts, seen, strict=True):
        for name in rank_gpus:
            hosts_by_model.setdefault(name, []).append(host)
    descriptions = []
    for name, model_hosts in hosts_by_model.items():
        distinct_hosts = list(dict.fromkeys(model_hosts))
        descriptions.append(
            f"{name} on {distinct_hosts[0]}{f' and {len(distinct_hosts) - 1} more' * (len(distinct_hosts) > 1)}"
        )
    if len(hosts_by_model) > 1:
        remedy = "set hardware.precision explicitly, `auto` depends on each rank's GPU; the slowest limits the speed"
        return warning("same gpus", ", ".join(descriptions), remedy)
    return passed("same gpus", f"{next(iter(hosts_by_model))} on all {num_hosts} hosts")


def has_kernels(capability: int, archs: tuple[str, ...]) -> bool:
    """True where one of `archs` runs on the GPU: machine code (`sm_`) runs on the same major version with an equal or
    newer minor version, PTX (`compute_`) on all newer ones."""
    for arch in archs:
        match = re.fullmatch(r"(sm|compute)_(\d+)([af]?)", arch)
        if match is None:
            continue
        number = int(match[2])
        if number == capability or (
            number < capability and not match[3] and (match[1] == "compute" or number // 10 == capability // 10)
        ):
            return True
    return False


def check_kernels_for(build: TorchBuild, gpus: list[Gpu]) -> Check:
    """Checks that torch has kernels for all GPUs. CUDA 13 wheels have none before Turing, torch 2.15 in no wheel."""
    unsupported = sorted({gpu.capability for gpu in gpus if not has_kernels(gpu.capability, build.archs)})
    summary = f"torch {build.version} for CUDA {build.cuda}"
    if not unsupported:
        return passed("torch's kernels", f"{summary} has kernels for every GPU of this host")
    remedy = "install a torch whose torch.cuda.get_arch_list() has them"
    if unsupported[0] < 75:
        remedy = (
            "pip install 'torch<=2.14' --index-url https://download.pytorch.org/whl/cu126: from torch 2.11 on only the "
            "cu126 wheels have kernels for Volta (V100), and from 2.15 on none"
        )
    names = ", ".join(f"sm_{capability}" for capability in unsupported)
    return failed("torch's kernels", f"{summary} has no kernels for {names}, only for {', '.join(build.archs)}", remedy)


def check_ability(gpus: list[Gpu]) -> Check:
    """Reports number formats and attention implementation of the GPU with the lowest capability."""
    lowest = min(gpu.capability for gpu in gpus)
    dtype = torch.bfloat16 if has_bf16(lowest) else torch.float16
    attention = dispatch.runnable("packed_attention", DispatchKey("cuda", lowest, dtype, 128))[0]
    if has_bf16(lowest):
        return passed("capability", f"sm_{lowest}: bf16 and FlashAttention-2; packed attention runs on {attention}")
    remedy = (
        "no action needed: hardware.precision=auto selects fp16. Start with hardware.initial_scale_power from 12 to "
        "16, monitor loss_scale; models trained in bf16 (LLaMA-2-7B) may overflow in fp16, so prefer tuning=lora or "
        "qlora. Do not force Triton's matrix kernels: below sm_80 they run without tensor cores"
    )
    return warning(
        "capability", f"sm_{lowest}: no bf16, no FlashAttention-2; packed attention runs on {attention}", remedy
    )


def check_bitsandbytes(files: list[str], cuda: str) -> Check:
    """Checks that bitsandbytes has a library for this CUDA version; it loads none of another major version."""
    required = "".join(cuda.split(".")[:2])
    available = sorted(match[1] for file in files if (match := re.match(r"libbitsandbytes_cuda(\d+)", file)))
    if required in available:
        return passed("bitsandbytes", f"has its library for CUDA {cuda}")
    compatible = [number for number in available if number[:2] == required[:2]]
    if compatible:
        remedy = (
            f"if QLoRA or 8-bit AdamW does not start: pip install -U bitsandbytes, or BNB_CUDA_VERSION={compatible[-1]}"
        )
        return warning(
            "bitsandbytes", f"no library for CUDA {cuda}, but for similar ones: {', '.join(compatible)}", remedy
        )
    remedy = "pip install -U bitsandbytes; until then tuning=qlora and optim.name=paged_adamw_32bit or adamw_8bit fail"
    return failed("bitsandbytes", f"no library for CUDA {cuda}: {', '.join(available) or 'only a CPU build'}", remedy)


def check_build_tools(ninja: bool, compiler: bool, triton_problem: str | None) -> Check:
    """Checks the tools that DeepSpeed needs to compile its CPU Adam on first use, with a GPU or without one, and on a
    GPU those that Triton needs (`triton_problem`: why it cannot build)."""
    if triton_problem:
        remedy = "install gcc and the headers of this Python; until then our Triton kernels do not run, nor optim=muon"
        return warning("build tools", triton_problem, remedy)
    missing = [name for name, is_available in (("ninja", ninja), ("a C++ compiler", compiler)) if not is_available]
    if not missing:
        return passed("build tools", "ninja, a C++ compiler: DeepSpeed's CPU Adam can be built")
    remedy = "only zero.offload_optimizer=cpu needs them: ninja on the PATH (activate the venv), g++"
    return warning("build tools", f"missing: {', '.join(missing)}", remedy)


def _build_tools(*, on_gpu: bool) -> Check:
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    triton_problem = triton_build_problem() if on_gpu else None
    return check_build_tools(shutil.which("ninja") is not None, compiler is not None, triton_problem)


def _cuda_error() -> str:
    if not torch.version.cuda:
        return ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return str(error).splitlines()[0]
    return "torch counts no devices"
