"""Rank of this process from the launcher's environment: deepspeed, torchrun, srun, mpirun or plain python."""

import atexit
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from fireflyds.errors import UserError

# Step IDs from this one on denote batch scripts and interactive shells.
_SLURM_SPECIAL_STEPS = 0xFFFFFFF0
# The default port of deepspeed and torchrun; used here for mpirun too.
LAUNCHER_PORT = 29500
# Variables of rank, size, local rank and local size: of Open MPI, of MVAPICH, of MPICH and Intel MPI.
_MPI = (
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    ("MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
)


@dataclass(frozen=True, slots=True)
class RankInfo:
    """Rank, local rank and world size of this process, and the address and port of rank 0."""

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int

    def export(self) -> None:
        """Set the environment variables that torch and DeepSpeed read.

        DeepSpeed refuses a local rank that differs from Open MPI's, as it does where each task sees one GPU alone.
        """
        if _MPI[0][2] in os.environ:
            os.environ[_MPI[0][2]] = str(self.local_rank)
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def rank_from_environment(environment: Mapping[str, str]) -> RankInfo:
    """Read the launcher's variables; without any, one process on a free port.

    Those of mpirun take precedence over Slurm's: inside an allocation its ranks are children of a Slurm step. Slurm's
    variables count only in a step started by `srun`: a plain `python` in a batch script or an interactive shell is one
    process.

    Raises:
        UserError: several ranks but no master address, or a variable that is not a number.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world_size = _int_variable(environment, "RANK"), _int_variable(environment, "WORLD_SIZE")
        local_rank = _int_variable(environment, "LOCAL_RANK", rank)
        if _started_by_deepspeed_on_one_node(environment):
            return RankInfo(rank, local_rank, world_size, "127.0.0.1", _shared_free_port(rank))
    elif names := _mpi_variables(environment):
        return _rank_from_mpi(environment, *names)
    elif _in_slurm_step(environment):
        rank, world_size = _int_variable(environment, "SLURM_PROCID"), _int_variable(environment, "SLURM_NTASKS")
        local_rank = _int_variable(environment, "SLURM_LOCALID", 0)
    else:
        return RankInfo(0, 0, 1, "127.0.0.1", free_port())
    if world_size == 1 and "MASTER_PORT" not in environment:
        return RankInfo(rank, local_rank, world_size, "127.0.0.1", free_port())
    return RankInfo(rank, local_rank, world_size, _master_addr(environment), _master_port(environment))


def _int_variable(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    remedy = "The launcher sets it: start with deepspeed, torchrun, srun or mpirun, and do not set it by hand"
    if text is None:
        raise UserError("is not set", key=name, remedy=remedy)
    try:
        return int(text)
    except ValueError:
        raise UserError("is no number", key=name, value=f"{text!r}", remedy=remedy) from None


def _in_slurm_step(environment: Mapping[str, str]) -> bool:
    return "SLURM_PROCID" in environment and 0 <= _int_variable(environment, "SLURM_STEP_ID", -1) < _SLURM_SPECIAL_STEPS


def _mpi_variables(environment: Mapping[str, str]) -> tuple[str, str, str, str] | None:
    """Names of the variables of rank, size, local rank and local size that MPI has set; None without MPI."""
    for names in _MPI:
        if names[0] in environment and names[1] in environment:
            # `srun --mpi=pmi2` sets the PMI variables too; Slurm's hold more, such as the local rank.
            pairs = (("PMI_RANK", "SLURM_PROCID"), ("PMI_SIZE", "SLURM_NTASKS"))
            same = all(environment.get(pmi) == environment.get(slurm) for pmi, slurm in pairs)
            if names[0] == "PMI_RANK" and _in_slurm_step(environment) and same:
                continue
            return names
    return None


def _rank_from_mpi(environment: Mapping[str, str], rank: str, size: str, local_name: str, local_size: str) -> RankInfo:
    rank_number, world_size = _int_variable(environment, rank), _int_variable(environment, size)
    if local_name not in environment and world_size > 1:
        raise UserError(
            f"{rank} is set and {local_name} is not, so the GPU of this rank is unknown",
            remedy="Start with the mpirun of Open MPI, MVAPICH, MPICH or Intel MPI, or with torchrun",
        )
    local_rank = _int_variable(environment, local_name, 0)
    if "MASTER_ADDR" in environment:
        port = _int_variable(environment, "MASTER_PORT", LAUNCHER_PORT)
        return RankInfo(rank_number, local_rank, world_size, environment["MASTER_ADDR"], port)
    if world_size > _int_variable(environment, local_size, world_size if world_size == 1 else 0):
        raise UserError(
            f"MASTER_ADDR is not set and {size}={world_size} ranks are on several hosts: MPI sets no rank 0 address",
            remedy="Start with mpirun -x MASTER_ADDR=<rank 0's host> (MPICH and Intel MPI: -genv MASTER_ADDR <host>)",
        )
    port = free_port() if world_size == 1 else _shared_free_port(rank_number)
    return RankInfo(rank_number, local_rank, world_size, "127.0.0.1", port)


def _started_by_deepspeed_on_one_node(environment: Mapping[str, str]) -> bool:
    """True with the launcher's default port, on which two jobs of one machine would collide."""
    return environment.get("CROSS_SIZE") == "1" and environment.get("MASTER_PORT") == str(LAUNCHER_PORT)


def _shared_free_port(rank: int, timeout: float = 120.0) -> int:
    """A free port, chosen by rank 0; the other children of the same launcher read it from a file."""
    parent = psutil.Process(os.getppid())
    file = Path(tempfile.gettempdir()) / f"fireflyds-port-{os.getuid()}-{parent.pid}-{int(parent.create_time())}"
    if rank == 0:
        port = free_port()
        partial = file.with_suffix(f".{os.getpid()}")
        partial.write_text(str(port))
        partial.rename(file)
        atexit.register(file.unlink, missing_ok=True)
        return port
    deadline = time.monotonic() + timeout
    while not file.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"rank 0 did not write its port to {file} within {timeout:.0f} s",
                key=f"rank {rank}",
                remedy="See the log of rank 0",
            )
        time.sleep(0.05)
    return int(file.read_text())


def _master_addr(environment: Mapping[str, str]) -> str:
    if address := environment.get("MASTER_ADDR"):
        return address
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    if not nodes:
        raise UserError(
            "is not set, and there is no Slurm node list",
            key="MASTER_ADDR",
            remedy="Start with deepspeed, torchrun, srun or mpirun",
        )
    return _resolvable_address(first_host(nodes))


def _resolvable_address(name: str) -> str:
    """The name of a node if it resolves; else Slurm's address of the node, if `scontrol` is available."""
    try:
        socket.getaddrinfo(name, None)
    except OSError:
        if shutil.which("scontrol"):
            import subprocess

            result = subprocess.run(["scontrol", "show", "node", name], capture_output=True, text=True)
            if match := re.search(r"\bNodeAddr=(\S+)", result.stdout):
                return match.group(1)
    # It may resolve on other hosts; a rank that cannot reach it raises later.
    return name


def _master_port(environment: Mapping[str, str]) -> int:
    if "MASTER_PORT" in environment:
        return _int_variable(environment, "MASTER_PORT")
    # All tasks of a Slurm step must agree without communication: the port is derived from variables that they share.
    # The restart count is one of them: the old port of a requeued job may still be in use.
    job, step = _int_variable(environment, "SLURM_JOB_ID", 0), _int_variable(environment, "SLURM_STEP_ID", 0)
    restarts = _int_variable(environment, "SLURM_RESTART_COUNT", 0)
    return 20_000 + (job * 31 + step + restarts * 7919) % 20_000


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[03-05,9],x1` gives `gpu03`."""
    head, bracket, ranges = nodes.partition("[")
    if not bracket or "," in head:
        return head.partition(",")[0]
    return head + ranges.partition("]")[0].partition(",")[0].partition("-")[0]


def is_alive(process: psutil.Process) -> bool:
    """True if the process is running and is not a zombie."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    """A TCP port of this host that is free at the moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
