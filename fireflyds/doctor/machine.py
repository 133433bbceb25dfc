"""Checks of this host: disk, resource limits, CPU cores, and environment variables that affect libraries."""

import os
import resource
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

from fireflyds.config import DoctorConfig
from fireflyds.distributed.shared_folder import existing_part
from fireflyds.distributed.timeouts import run_with_timeout
from fireflyds.doctor.check import Check, failed, passed, warning

MIB, GIB = 1 << 20, 1 << 30
# NCCL allocates about 10 MB of shared memory per pair of GPUs of a host; Docker's default is 64 MB in total.
_LEAST_SHM = GIB
# A rank opens one or two sockets per other rank, and one file per shard of model and data.
_LEAST_OPEN_FILES = 4096
# Variables that slow down training, or let a failed rank hang the others: the value that does ("": any), its effect.
_HARMFUL_VARIABLES = {
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel waits for the previous one"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "every collective is checked on all ranks first"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", "every tensor is allocated by the driver"),
    "NCCL_P2P_DISABLE": ("1", "GPUs of one host communicate through host memory instead of NVLink or PCIe"),
    "NCCL_SHM_DISABLE": ("1", "GPUs of one host communicate through the network"),
    "NCCL_IB_DISABLE": ("1", "hosts communicate over TCP instead of InfiniBand or RoCE"),
    "NCCL_DEBUG": ("TRACE", "every call is logged"),
    "NCCL_ALGO": ("", "NCCL's own choice of algorithm is disabled"),
    "NCCL_PROTO": ("", "NCCL's own choice of protocol is disabled"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("0", "a failed rank hangs the others indefinitely"),
}


def check_all(config: DoctorConfig, ranks_here: int, num_hosts: int, gpus: int, cores: int | None) -> list[Check]:
    """Runs all checks of a host. `cores`: number that its ranks may use together; None if unknown, then not checked."""
    memlock, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    shm = Path("/dev/shm")
    threads = os.environ.get("OMP_NUM_THREADS")
    return [
        check_disk(config),
        check_memlock(None if memlock == resource.RLIM_INFINITY else memlock, gpus, num_hosts),
        check_shared_memory(shutil.disk_usage(shm).free if shm.is_dir() else 0, ranks_here, gpus),
        check_open_files(files if files != resource.RLIM_INFINITY else None),
        *([] if cores is None else [check_cores(cores, os.cpu_count() or 1, ranks_here, threads, gpus)]),
        check_variables(os.environ, psutil.net_if_addrs(), num_hosts),
    ]


def check_disk(config: DoctorConfig) -> Check:
    """Checks free space, and the speed of writing and reading one file in MiB/s, on all hosts at the same time."""
    try:
        # On an unreachable drive the first access of the folder already hangs.
        return run_with_timeout(config.timeout, lambda: _measure_disk(config))
    except TimeoutError:
        remedy = "check for an unreachable network drive (df hangs as well), or give another runs= or smaller disk_mib="
        message = f"runs={config.runs}: {config.disk_mib} MiB not written and read within {config.timeout:g} s"
        return failed("disk", message, remedy)
    except OSError as error:
        remedy = "make it writable, free space or quota there, mount a stale drive again, or give another runs="
        return failed("disk", f"runs={config.runs}: cannot be read and written ({error.strerror or error})", remedy)


def _measure_disk(config: DoctorConfig) -> Check:
    folder = existing_part(config.runs)
    if not folder.is_dir():
        return failed("disk", f"runs={config.runs}: {folder} is a file", "give runs=<a folder>")
    free = shutil.disk_usage(folder).free
    if free < 2 * config.disk_mib * MIB:
        message = f"{folder}: {free / GIB:.1f} GiB free, less than twice disk_mib={config.disk_mib}"
        return failed("disk", message, "free space there, or give another runs=")
    writing, reading = speeds(folder, config.disk_mib)
    summary = f"{folder}: {free / GIB:,.0f} GiB free, writes {writing:,.0f} MiB/s, reads {reading:,.0f} MiB/s"
    if free < config.min_free_gib * GIB:
        remedy = (
            f"less than min_free_gib={config.min_free_gib:g}: free space, keep fewer checkpoints (checkpoint.keep) or "
            "give another runs=. A full-parameter checkpoint of 7 B parameters with its AdamW states is about 90 GiB"
        )
        return warning("disk", summary, remedy, writing, "MiB/s")
    if min(writing, reading) < config.min_disk_mib_s:
        remedy = (
            f"less than min_disk_mib_s={config.min_disk_mib_s:g}: saving checkpoints will be slow; give runs= on a "
            "faster disk"
        )
        return warning("disk", summary, remedy, writing, "MiB/s")
    return passed("disk", summary, writing, "MiB/s")


def speeds(folder: Path, mib: int) -> tuple[float, float]:
    """MiB/s of writing a file including fsync, and of reading it after dropping it from the cache where supported."""
    # Random, and longer than the window of compressing file systems.
    block = os.urandom(8 * MIB)
    # The file has no name, so it is removed even if the process is killed.
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        started = time.perf_counter()
        for written in range(0, mib, 8):
            file.write(block[: min(8, mib - written) * MIB])
        os.fsync(file.fileno())
        writing = time.perf_counter() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        bytes_read = 0
        while chunk := file.read(8 * MIB):
            bytes_read += len(chunk)
        reading = time.perf_counter() - started
    if bytes_read != mib * MIB:
        raise OSError(0, f"read {bytes_read} of {mib * MIB} bytes")
    return mib / writing, mib / reading


def check_memlock(limit: int | None, gpus: int, num_hosts: int) -> Check:
    """Limit of locked memory in bytes, None if unlimited: DeepSpeed pins offloaded tensors, InfiniBand its buffers."""
    summary = "unlimited" if limit is None else f"{limit / MIB:,.0f} MiB"
    if limit is None or not gpus:
        return passed("locked memory", summary + ("" if gpus else "; nothing is pinned without a GPU"))
    features = "zero.offload_optimizer, zero.offload_param" + (
        " and InfiniBand between the hosts" if num_hosts > 1 else ""
    )
    remedy = (
        f"{features} may need more: `ulimit -l unlimited`, `* - memlock unlimited` in /etc/security/limits.conf, for "
        "Slurm LimitMEMLOCK=infinity in slurmd's unit, for Docker --ulimit memlock=-1"
    )
    return warning("locked memory", summary, remedy)


def check_shared_memory(free: int, ranks_here: int, gpus: int) -> Check:
    """`free`: bytes free in /dev/shm, through which NCCL ranks of one host communicate."""
    summary = f"/dev/shm has {free / GIB:.1f} GiB free"
    if free >= _LEAST_SHM or gpus < 2:
        return passed("shared memory", summary)
    remedy = "Docker: --shm-size=8g or --ipc=host; otherwise `mount -o remount,size=8G /dev/shm`"
    if ranks_here > 1:
        return failed("shared memory", f"{summary}, too little for {ranks_here} ranks of NCCL", remedy)
    return warning("shared memory", f"{summary}, too little for several ranks of NCCL", remedy)


def check_open_files(limit: int | None) -> Check:
    """Checks the limit of open files of a process; None: unlimited."""
    if limit is None or limit >= _LEAST_OPEN_FILES:
        return passed("open files", "unlimited" if limit is None else f"up to {limit:,}")
    return warning("open files", f"up to {limit:,}", f"`ulimit -n {_LEAST_OPEN_FILES * 16}` before the start")


def check_cores(allowed: int, cores: int, ranks_here: int, threads: str | None, gpus: int) -> Check:
    """`allowed`: cores that the ranks of this host may use together, of all `cores`; `threads`: OMP_NUM_THREADS.

    Without a GPU, training divides the cores among the ranks itself (`zero.engine.init_distributed`).
    """
    summary = (
        f"{allowed} of {cores} for {ranks_here} rank{'s' * (ranks_here > 1)}, OMP_NUM_THREADS {threads or 'not set'}"
    )
    if threads is not None and not (threads.isdigit() and int(threads)):
        return failed("cores", summary, "OMP_NUM_THREADS must be a number of at least 1: unset it")
    if allowed < min(ranks_here, cores):
        remedy = "request more: Slurm --cpus-per-task, Docker --cpus, taskset"
        return warning("cores", summary, remedy)
    if threads is not None and int(threads) * ranks_here > allowed:
        return warning("cores", summary, f"more threads than cores: OMP_NUM_THREADS={max(1, allowed // ranks_here)}")
    if gpus and threads == "1" and allowed // ranks_here > 1:
        remedy = (
            f"torchrun sets it. It slows only zero.offload_optimizer=cpu, whose Adam runs on one core: "
            f"OMP_NUM_THREADS={allowed // ranks_here}"
        )
        return warning("cores", summary, remedy)
    return passed("cores", summary)


def check_variables(environment: Mapping[str, str], interfaces: Iterable[str], num_hosts: int) -> Check:
    """Checks for settings of NCCL, gloo and torch that are rarely intended."""
    faults, remedies = [], []
    interface_names = sorted(interfaces)
    for name, find_fault in (("NCCL_SOCKET_IFNAME", nccl_fault), ("GLOO_SOCKET_IFNAME", gloo_fault)):
        if fault := find_fault(environment.get(name, ""), interface_names, num_hosts):
            faults.append(f"{name}={environment[name]} {fault}")
            remedies.append(f"unset {name} or set it to one of these interfaces")
    is_error = bool(faults)
    for name, (value, effect) in _HARMFUL_VARIABLES.items():
        if name in environment and (not value or environment[name].upper() == value):
            faults.append(f"{name}={environment[name]}: {effect}")
            remedies.append(f"unset {name} unless it is intended")
    if not faults:
        names = sorted(name for name in environment if name.startswith(("NCCL_", "GLOO_", "TORCH_NCCL_")))
        return passed("variables", ", ".join(f"{name}={environment[name]}" for name in names) or "NCCL's own choices")
    remedy = "; ".join(remedies)
    return (
        failed("variables", "; ".join(faults), remedy) if is_error else warning("variables", "; ".join(faults), remedy)
    )


def nccl_fault(value: str, known: list[str], num_hosts: int) -> str:
    """Describes the fault in NCCL_SOCKET_IFNAME, empty if none: `^docker0` excludes an interface, `=eth0` is an exact
    name, `eth` a prefix. `known`: interfaces of this host."""
    if not value or value.startswith("^"):
        return ""
    names = [name for name in value.lstrip("=").split(",") if name]
    matches = {
        interface
        for name in names
        for interface in known
        if (interface == name if value[0] == "=" else interface.startswith(name))
    }
    if not matches:
        return f"names no interface of this host ({', '.join(known)})"
    return "cannot reach another host" if num_hosts > 1 and matches <= {"lo"} else ""


def gloo_fault(value: str, known: list[str], num_hosts: int) -> str:
    """Describes the fault in GLOO_SOCKET_IFNAME, empty if none: gloo takes exact names, opens each interface and fails
    where one does not exist (torch, ProcessGroupGloo.cpp)."""
    # Like torch, which ignores a value of one character.
    names = value.split(",") if len(value) > 1 else []
    if missing := [name for name in names if name not in known]:
        prefix = "" if len(names) == 1 else f": {', '.join(missing)}"
        return f"names no interface of this host ({', '.join(known)}){prefix}; gloo takes whole names only"
    return "cannot reach another host" if num_hosts > 1 and "lo" in names else ""
