"""This host: its disk, its limits, its processor cores and the variables that change how libraries behave."""

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
# NCCL asks for some 10 MB of shared memory per pair of GPUs of a host; Docker gives 64 MB in all unless told.
_LEAST_SHM = GIB
# A rank opens a socket or two per other rank and a file per shard of model and data.
_LEAST_OPEN_FILES = 4096
# Variables that slow everything down, or let a dead rank hang the others, with the values that do; "" is any value.
_SLOW = {
    "CUDA_LAUNCH_BLOCKING": ("1", "every kernel waits for the one before"),
    "TORCH_DISTRIBUTED_DEBUG": ("DETAIL", "every collective is checked on all ranks first"),
    "PYTORCH_NO_CUDA_MEMORY_CACHING": ("1", "every tensor is allocated by the driver"),
    "NCCL_P2P_DISABLE": ("1", "GPUs of a host talk through its memory instead of NVLink or PCIe"),
    "NCCL_SHM_DISABLE": ("1", "GPUs of a host talk through the network"),
    "NCCL_IB_DISABLE": ("1", "hosts talk over TCP instead of InfiniBand or RoCE"),
    "NCCL_DEBUG": ("TRACE", "every call is logged"),
    "NCCL_ALGO": ("", "NCCL's own choice of algorithm is off"),
    "NCCL_PROTO": ("", "NCCL's own choice of protocol is off"),
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": ("0", "a rank that dies hangs the others for ever"),
}


def check_all(config: DoctorConfig, ranks_here: int, num_hosts: int, gpus: int, cores: int | None) -> list[Check]:
    """`cores` that the ranks of this host may use together; None where that is not known, and nothing is said of them."""
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
    """Space, and the speed of writing and reading one file, in MiB/s. All hosts do it at the same time."""
    try:
        # On a drive that is gone the first look at the folder hangs already.
        return run_with_timeout(config.timeout, lambda: _try_disk(config))
    except TimeoutError:
        remedy = "look for a network drive that is gone (df hangs too), or give another runs=, a smaller disk_mib="
        found = f"runs={config.runs}: {config.disk_mib} MiB not written and read within {config.timeout:g} s"
        return failed("disk", found, remedy)
    except OSError as error:
        remedy = "make it writable, free space or quota there, mount a stale drive again, or give another runs="
        return failed("disk", f"runs={config.runs}: cannot be read and written ({error.strerror or error})", remedy)


def _try_disk(config: DoctorConfig) -> Check:
    place = existing_part(config.runs)
    if not place.is_dir():
        return failed("disk", f"runs={config.runs}: {place} is a file", "give runs=<a folder>")
    free = shutil.disk_usage(place).free
    if free < 2 * config.disk_mib * MIB:
        found = f"{place}: {free / GIB:.1f} GiB free, less than twice disk_mib={config.disk_mib}"
        return failed("disk", found, "free space there, or give another runs=")
    writing, reading = speeds(place, config.disk_mib)
    about = f"{place}: {free / GIB:,.0f} GiB free, writes {writing:,.0f} MiB/s, reads {reading:,.0f} MiB/s"
    if free < config.min_free_gib * GIB:
        remedy = (
            f"less than min_free_gib={config.min_free_gib:g}: free space, keep fewer checkpoints (checkpoint.keep) or "
            "give another runs=. A full-parameter checkpoint of 7 B parameters with its AdamW states is some 90 GiB"
        )
        return warning("disk", about, remedy, writing, "MiB/s")
    if min(writing, reading) < config.min_disk_mib_s:
        remedy = f"less than min_disk_mib_s={config.min_disk_mib_s:g}: checkpoints will take long; give a faster disk's runs="
        return warning("disk", about, remedy, writing, "MiB/s")
    return passed("disk", about, writing, "MiB/s")


def speeds(place: Path, mib: int) -> tuple[float, float]:
    """MiB/s of writing a file down to the disk, and of reading it after the cache has let it go, where it does."""
    # Longer than compressing file systems look back, and random.
    block = os.urandom(8 * MIB)
    # It has no name, so nothing is left behind whatever happens.
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        started = time.perf_counter()
        for written in range(0, mib, 8):
            file.write(block[: min(8, mib - written) * MIB])
        os.fsync(file.fileno())
        writing = time.perf_counter() - started
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        file.seek(0)
        started = time.perf_counter()
        read = 0
        while piece := file.read(8 * MIB):
            read += len(piece)
        reading = time.perf_counter() - started
    if read != mib * MIB:
        raise OSError(0, f"{read} bytes came back of {mib * MIB}")
    return mib / writing, mib / reading


def check_memlock(limit: int | None, gpus: int, num_hosts: int) -> Check:
    """Locked memory in bytes, None without limit: DeepSpeed pins what it offloads, InfiniBand what it sends."""
    told = "unlimited" if limit is None else f"{limit / MIB:,.0f} MiB"
    if limit is None or not gpus:
        return passed("locked memory", told + ("" if gpus else "; nothing is pinned without a GPU"))
    needs = "zero.offload_optimizer, zero.offload_param" + (
        " and InfiniBand between the hosts" if num_hosts > 1 else ""
    )
    remedy = (
        f"{needs} may need more: `ulimit -l unlimited`, `* - memlock unlimited` in /etc/security/limits.conf, for Slurm "
        "LimitMEMLOCK=infinity in slurmd's unit, for Docker --ulimit memlock=-1"
    )
    return warning("locked memory", told, remedy)


def check_shared_memory(free: int, ranks_here: int, gpus: int) -> Check:
    """Bytes free in /dev/shm, through which NCCL's ranks of one host talk."""
    told = f"/dev/shm has {free / GIB:.1f} GiB free"
    if free >= _LEAST_SHM or gpus < 2:
        return passed("shared memory", told)
    remedy = "Docker: --shm-size=8g or --ipc=host; otherwise `mount -o remount,size=8G /dev/shm`"
    if ranks_here > 1:
        return failed("shared memory", f"{told}, too little for {ranks_here} ranks of NCCL", remedy)
    return warning("shared memory", f"{told}, too little for several ranks of NCCL", remedy)


def check_open_files(limit: int | None) -> Check:
    if limit is None or limit >= _LEAST_OPEN_FILES:
        return passed("open files", "unlimited" if limit is None else f"up to {limit:,}")
    return warning("open files", f"up to {limit:,}", f"`ulimit -n {_LEAST_OPEN_FILES * 16}` before the start")


def check_cores(allowed: int, cores: int, ranks_here: int, threads: str | None, gpus: int) -> Check:
    """Cores that the ranks here may use together, of all, and OMP_NUM_THREADS. `start` divides the cores itself where there is no GPU."""
    told = f"{allowed} of {cores} for {ranks_here} rank{'s' * (ranks_here > 1)}, OMP_NUM_THREADS {threads or 'not set'}"
    if threads is not None and not (threads.isdigit() and int(threads)):
        return failed("cores", told, "OMP_NUM_THREADS must be a number of at least 1: unset it")
    if allowed < min(ranks_here, cores):
        remedy = "ask for more: Slurm --cpus-per-task, Docker --cpus, taskset"
        return warning("cores", told, remedy)
    if threads is not None and int(threads) * ranks_here > allowed:
        return warning("cores", told, f"more threads than cores: OMP_NUM_THREADS={max(1, allowed // ranks_here)}")
    if gpus and threads == "1" and allowed // ranks_here > 1:
        remedy = (
            f"torchrun sets it. It slows only zero.offload_optimizer=cpu, whose Adam runs on one core: "
            f"OMP_NUM_THREADS={allowed // ranks_here}"
        )
        return warning("cores", told, remedy)
    return passed("cores", told)


def check_variables(environment: Mapping[str, str], interfaces: Iterable[str], num_hosts: int) -> Check:
    """Settings of NCCL, gloo and torch that are seldom meant."""
    faults, remedies = [], []
    known = sorted(interfaces)
    for name, judge in (("NCCL_SOCKET_IFNAME", nccl_fault), ("GLOO_SOCKET_IFNAME", gloo_fault)):
        if fault := judge(environment.get(name, ""), known, num_hosts):
            faults.append(f"{name}={environment[name]} {fault}")
            remedies.append(f"unset {name} or give one of them")
    broken = bool(faults)
    for name, (value, effect) in _SLOW.items():
        if name in environment and (not value or environment[name].upper() == value):
            faults.append(f"{name}={environment[name]}: {effect}")
            remedies.append(f"unset {name} unless you mean it")
    if not faults:
        ours = sorted(name for name in environment if name.startswith(("NCCL_", "GLOO_", "TORCH_NCCL_")))
        return passed("variables", ", ".join(f"{name}={environment[name]}" for name in ours) or "NCCL's own choices")
    remedy = "; ".join(remedies)
    return failed("variables", "; ".join(faults), remedy) if broken else warning("variables", "; ".join(faults), remedy)


def nccl_fault(value: str, known: list[str], num_hosts: int) -> str:
    """What is wrong with NCCL's choice of interfaces: `^docker0` excludes; `=eth0` is the very name, `eth` every name
    that begins so."""
    if not value or value.startswith("^"):
        return ""
    wanted = [part for part in value.lstrip("=").split(",") if part]
    there = {each for part in wanted for each in known if (each == part if value[0] == "=" else each.startswith(part))}
    if not there:
        return f"names no interface of this host ({', '.join(known)})"
    return "cannot reach another host" if num_hosts > 1 and there <= {"lo"} else ""


def gloo_fault(value: str, known: list[str], num_hosts: int) -> str:
    """The same of gloo, which takes whole names, opens every one and fails where one is not there (torch,
    ProcessGroupGloo.cpp)."""
    # As torch does, which takes a single character for nothing.
    wanted = value.split(",") if len(value) > 1 else []
    if absent := [part for part in wanted if part not in known]:
        prefix = "" if len(wanted) == 1 else f": {', '.join(absent)}"
        return f"names no interface of this host ({', '.join(known)}){prefix}; gloo takes whole names only"
    return "cannot reach another host" if num_hosts > 1 and "lo" in wanted else ""
