"""Checks between ranks: ports, shared folder, all-reduce. Measurements of each rank, and their evaluation on rank 0."""

import contextlib
import socket
import time
from collections.abc import Iterator
from statistics import median
from typing import Any

import torch

from fireflyds.config import DoctorConfig
from fireflyds.distributed import collectives
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.distributed.rendezvous import StoreChannel
from fireflyds.distributed.shared_folder import REMEDY, describe_blind_ranks
from fireflyds.distributed.timeouts import run_with_timeout
from fireflyds.doctor.check import Check, failed, passed, warning
from fireflyds.zero import engine

MIB = 1 << 20
_CONNECT_SECONDS = 3.0


@contextlib.contextmanager
def listening_socket(address: str) -> Iterator[socket.socket]:
    """Yields a socket that listens on a free port of `address` (if empty, of all addresses); closed after the block."""
    with _listener(address) as listener:
        yield listener


def _listener(address: str) -> socket.socket:
    if not address and socket.has_dualstack_ipv6():
        # IPv6 may be supported by the kernel, but disabled.
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=64, dualstack_ipv6=True)
    return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=64)


def announced_address(me: RankInfo, timeout: float) -> tuple[str, str]:
    """The address under which the other hosts reach this one, and the address to listen on (empty: all).

    For rank 0 it is MASTER_ADDR, which all ranks have used: its own resolver may return 127.0.1.1, as with Debian's
    /etc/hosts. For other ranks it is the local address of their connection to rank 0.
    """
    if me.rank == 0:
        return me.master_addr, ""
    with socket.create_connection((me.master_addr, me.master_port), timeout) as connection:
        address = str(connection.getsockname()[0])
    return address, address


def connect_to(ports: list[tuple[str, str, int]]) -> list[str]:
    """Connects to each port (host, address, port). Returns a message for each that cannot be reached."""
    failures = []
    for host, address, port in ports:
        try:
            socket.create_connection((address, port), _CONNECT_SECONDS).close()
        except OSError as error:
            failures.append(f"{host} ({address}:{port}): {error}")
    return failures


def check_ports(closed: dict[str, list[str]]) -> Check:
    """`closed`: unreachable ports by connecting host. NCCL and gloo use any free ports, so all of them must be open."""
    faults = [f"{host} cannot reach {failure}" for host, host_failures in closed.items() for failure in host_failures]
    if not faults:
        message = (
            "the hosts reach each other's free ports" if len(closed) > 1 else "free ports of this host can be reached"
        )
        return passed("ports", message)
    remedy = (
        "open all ports between the hosts, or name the network they share: NCCL_SOCKET_IFNAME=<interface> and "
        "GLOO_SOCKET_IFNAME=<interface>"
    )
    return failed("ports", "; ".join(faults[:4]) + f" and {len(faults) - 4} more" * (len(faults) > 4), remedy)


def check_shared_folder(answers: list[dict[str, Any]], hosts: list[str], runs: str) -> Check:
    """Checks that all ranks see rank 0's file. `answers` of `read_token` and `hosts`, by rank."""
    if text := describe_blind_ranks(answers, hosts, runs):
        return failed("shared folder", text, REMEDY)
    slowest = max(answer["seconds"] for answer in answers)
    folder = answers[0].get("place", runs)
    return passed("shared folder", f"{folder}: all {len(answers)} ranks see rank 0's file there", slowest, "s")


def all_reduce(channel: StoreChannel, config: DoctorConfig) -> dict[str, Any]:
    """Initializes the process group as training does and sums a tensor over all ranks repeatedly.

    Returns the seconds of each repetition, whether all sums were right, and the backend.
    """

    def work() -> dict[str, Any]:
        # Longer than the timeout of the doctor: the watchdog of the group would end the process before the report.
        engine.init_distributed(channel.me, 10 * config.timeout / 60)
        channel.set(f"joined/{channel.me.rank}", True)
        import torch.distributed as dist

        device = torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
        tensor = torch.empty(config.all_reduce_mib * MIB // 4, device=device)
        n, seconds, right = channel.me.world_size, [], True
        for _ in range(1 + config.all_reduce_repeats):
            tensor.fill_(channel.me.rank + 1)
            dist.barrier()
            _synchronize(device)
            started = time.perf_counter()
            dist.all_reduce(tensor)
            _synchronize(device)
            seconds.append(time.perf_counter() - started)
            right &= bool((tensor == n * (n + 1) / 2).all())
        backend = dist.get_backend()
        collectives.leave_group()
        # The first repetition includes the connection setup.
        return {"seconds": seconds[1:], "right": right, "backend": backend}

    return run_with_timeout(config.timeout, work)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bus_bandwidth(bytes_reduced: int, ranks: int, seconds: float) -> float:
    """Bytes per second over each rank's link: a ring sends 2 (n - 1) / n of the data (nccl-tests, PERFORMANCE.md)."""
    return 2 * (ranks - 1) / ranks * bytes_reduced / seconds


def check_all_reduce(
    answers: list[dict[str, Any]], hosts: list[str], joined: list[bool], config: DoctorConfig
) -> Check:
    """`answers`, `hosts` and whether ranks `joined` the group, by rank. `error`: empty for a rank without an answer."""
    failing = [rank for rank, answer in enumerate(answers) if "error" in answer]
    if failing:
        not_joined = [rank for rank, has_joined in enumerate(joined) if not has_joined]
        # Ranks without an answer are the cause of the timeouts that other ranks report.
        causes = [rank for rank in failing if not answers[rank]["error"]] or failing
        reasons = (answers[rank]["error"] or "no answer" for rank in causes)
        failures = ", ".join(
            f"rank {rank} on {hosts[rank]}: {reason}" for rank, reason in zip(causes[:4], reasons, strict=False)
        )
        group_status = (
            f"; rank {', '.join(map(str, not_joined[:8]))} did not join the group"
            if not_joined
            else "; all ranks had joined the group"
        )
        remedy = (
            "start again with NCCL_DEBUG=INFO (TORCH_CPP_LOG_LEVEL=INFO for gloo) and see which interface it takes; "
            "name it with NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, or give a longer timeout="
        )
        return failed("all-reduce", failures + group_status, remedy)
    if wrong := [rank for rank, answer in enumerate(answers) if not answer["right"]]:
        remedy = "a defect of hardware or driver: try NCCL_P2P_DISABLE=1, then half of the GPUs, to find which"
        return failed("all-reduce", f"the sum is wrong on rank {', '.join(map(str, wrong))}", remedy)
    slowest = max(median(answer["seconds"]) for answer in answers)
    speed = bus_bandwidth(config.all_reduce_mib * MIB, len(answers), slowest) / 1e9
    message = (
        f"{answers[0]['backend']}, {len(answers)} ranks, {config.all_reduce_mib} MiB in {1000 * slowest:.1f} ms: "
        f"{speed:.2f} GB/s bus bandwidth"
    )
    # gloo is slow between CPU cores, which indicates no problem.
    if speed >= config.min_bus_gb_s or answers[0]["backend"] != "nccl":
        return passed("all-reduce", message, speed, "GB/s")
    remedy = (
        f"less than min_bus_gb_s={config.min_bus_gb_s:g}: see `variables`, nvidia-smi topo -m and NCCL_DEBUG=INFO for "
        "the transport; on slow links prefer zero=stage1 or stage2, and gradient accumulation"
    )
    return warning("all-reduce", message, remedy, speed, "GB/s")
