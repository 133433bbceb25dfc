"""Who this process is among the ranks, whoever started it: deepspeed, torchrun, srun or plain python."""

import atexit
import os
import socket
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from fireflyds.errors import UserError

# Batch scripts and interactive shells are steps too, numbered from here on.
_SLURM_SPECIAL_STEPS = 0xFFFFFFF0
_DEEPSPEED_PORT = "29500"


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process's place."""

    rank: int
    local_rank: int
    world_size: int
    master_addr: str
    master_port: int

    def export(self) -> None:
        """Say it in the variables that torch and DeepSpeed read."""
        os.environ.update(
            RANK=str(self.rank),
            LOCAL_RANK=str(self.local_rank),
            WORLD_SIZE=str(self.world_size),
            MASTER_ADDR=self.master_addr,
            MASTER_PORT=str(self.master_port),
        )


def discover(environment: Mapping[str, str]) -> Ranks:
    """Read the launcher's variables; without any, one process on a free port.

    Slurm's own variables count only in a step started by `srun`: a plain `python` in a batch script or an
    interactive shell is one process.

    Raises:
        UserError: several ranks but no master address.
    """
    if "RANK" in environment and "WORLD_SIZE" in environment:
        rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
        local_rank = int(environment.get("LOCAL_RANK", rank))
        if _started_by_deepspeed_on_one_node(environment):
            return Ranks(rank, local_rank, world_size, "127.0.0.1", _shared_free_port(rank))
    elif "SLURM_PROCID" in environment and 0 <= int(environment.get("SLURM_STEP_ID", "-1")) < _SLURM_SPECIAL_STEPS:
        rank, world_size = int(environment["SLURM_PROCID"]), int(environment["SLURM_NTASKS"])
        local_rank = int(environment.get("SLURM_LOCALID", "0"))
    else:
        return Ranks(0, 0, 1, "127.0.0.1", free_port())
    if world_size == 1 and "MASTER_PORT" not in environment:
        return Ranks(rank, local_rank, world_size, "127.0.0.1", free_port())
    return Ranks(rank, local_rank, world_size, _master_addr(environment), _master_port(environment))


def _started_by_deepspeed_on_one_node(environment: Mapping[str, str]) -> bool:
    """With the launcher's default port, on which two jobs of one machine would collide."""
    return environment.get("CROSS_SIZE") == "1" and environment.get("MASTER_PORT") == _DEEPSPEED_PORT


def _shared_free_port(rank: int, timeout: float = 120.0) -> int:
    """A free port that rank 0 chooses and its siblings, children of the same launcher, read from a file."""
    parent = psutil.Process(os.getppid())
    file = Path(tempfile.gettempdir()) / f"fireflyds-port-{os.getuid()}-{parent.pid}-{int(parent.create_time())}"
    if rank == 0:
        port = free_port()
        aside = file.with_suffix(f".{os.getpid()}")
        aside.write_text(str(port))
        aside.rename(file)
        atexit.register(file.unlink, missing_ok=True)
        return port
    until = time.monotonic() + timeout
    while not file.exists():
        if time.monotonic() > until:
            raise UserError(f"rank {rank}: rank 0 did not say its port in {file} within {timeout:.0f} s; see its log")
        time.sleep(0.05)
    return int(file.read_text())


def _master_addr(environment: Mapping[str, str]) -> str:
    if address := environment.get("MASTER_ADDR"):
        return address
    nodes = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_NODELIST", "")
    if not nodes:
        raise UserError(
            "MASTER_ADDR is not set and there is no Slurm node list: start with deepspeed, torchrun or srun"
        )
    return first_host(nodes)


def _master_port(environment: Mapping[str, str]) -> int:
    if port := environment.get("MASTER_PORT"):
        return int(port)
    # All tasks of a Slurm step must agree without talking: derive the port from what they share.
    job, step = int(environment.get("SLURM_JOB_ID", "0")), int(environment.get("SLURM_STEP_ID", "0"))
    return 20_000 + (job * 31 + step) % 20_000


def first_host(nodes: str) -> str:
    """The first host of a Slurm node list: `gpu[03-05,9],x1` gives `gpu03`."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.partition(",")[0]
    return head + rest.partition("]")[0].partition(",")[0].partition("-")[0]


def lives(process: psutil.Process) -> bool:
    """Neither gone nor dead and not yet buried by its parent."""
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
