"""What lies between ranks: ports, the shared folder, the all-reduce. Every rank's part, and the judgement."""

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
from fireflyds.zero import engine as deepspeed

MIB = 1 << 20
_CONNECT_SECONDS = 3.0


@contextlib.contextmanager
def listening_socket(address: str) -> Iterator[socket.socket]:
    """A socket on any free port of that address, or of all where it is empty, open for as long as others try it."""
    with _listener(address) as found:
        yield found


def _listener(address: str) -> socket.socket:
    if not address and socket.has_dualstack_ipv6():
        # A kernel may know IPv6 and be forbidden to use it.
        with contextlib.suppress(OSError):
            return socket.create_server(("", 0), family=socket.AF_INET6, backlog=64, dualstack_ipv6=True)
    return socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET, backlog=64)


def announced_address(me: RankInfo, timeout: float) -> tuple[str, str]:
    """The address under which the other hosts reach this one, and the one to listen on.

    Of rank 0 that by which they all came: its own resolver may call it 127.0.1.1, as Debian's /etc/hosts does. Of the
    others that from which they came to it.
    """
    if me.rank == 0:
        return me.master_addr, ""
    with socket.create_connection((me.master_addr, me.master_port), timeout) as way:
        own = str(way.getsockname()[0])
    return own, own


def connect_to(doors: list[tuple[str, str, int]]) -> list[str]:
    """Which of these hosts' ports (host, address, port) this process cannot reach, and why."""
    closed = []
    for host, address, port in doors:
        try:
            socket.create_connection((address, port), _CONNECT_SECONDS).close()
        except OSError as error:
            closed.append(f"{host} ({address}:{port}): {error}")
    return closed


def check_ports(closed: dict[str, list[str]]) -> Check:
    """`closed` by the host that tried. NCCL and gloo choose free ports, so all must be open between the hosts."""
    faults = [f"{host} cannot reach {each}" for host, of_host in closed.items() for each in of_host]
    if not faults:
        told = (
            "the hosts reach each other's free ports" if len(closed) > 1 else "free ports of this host can be reached"
        )
        return passed("ports", told)
    remedy = (
        "open all ports between the hosts, or name the network they share: NCCL_SOCKET_IFNAME=<interface> and "
        "GLOO_SOCKET_IFNAME=<interface>"
    )
    return failed("ports", "; ".join(faults[:4]) + f" and {len(faults) - 4} more" * (len(faults) > 4), remedy)


def check_shared_folder(answers: list[dict[str, Any]], hosts: list[str], runs: str) -> Check:
    """`answers` of `read_token` and `hosts`, by rank."""
    if text := describe_blind_ranks(answers, hosts, runs):
        return failed("shared folder", text, REMEDY)
    slowest = max(answer["seconds"] for answer in answers)
    folder = answers[0].get("place", runs)
    return passed("shared folder", f"{folder}: all {len(answers)} ranks see rank 0's file there", slowest, "s")


def all_reduce(channel: StoreChannel, config: DoctorConfig) -> dict[str, Any]:
    """Start the process group as training does and sum a tensor over all ranks: seconds of each time, and the backend."""

    def work() -> dict[str, Any]:
        # Longer than the doctor waits: a watchdog that ends the process would end the report with it.
        deepspeed.init_distributed(channel.me, 10 * config.timeout / 60)
        channel.set(f"joined/{channel.me.rank}", True)
        import torch.distributed as dist

        device = torch.device("cuda", channel.me.local_rank) if torch.cuda.is_available() else torch.device("cpu")
        tensor = torch.empty(config.all_reduce_mib * MIB // 4, device=device)
        n, seconds, right = channel.me.world_size, [], True
        for _ in range(1 + config.all_reduce_repeats):
            tensor.fill_(channel.me.rank + 1)
            dist.barrier()
            _finish(device)
            started = time.perf_counter()
            dist.all_reduce(tensor)
            _finish(device)
            seconds.append(time.perf_counter() - started)
            right &= bool((tensor == n * (n + 1) / 2).all())
        backend = dist.get_backend()
        collectives.leave_group()
        # The first one also connects.
        return {"seconds": seconds[1:], "right": right, "backend": backend}

    return run_with_timeout(config.timeout, work)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def bus_bandwidth(bytes_reduced: int, ranks: int, seconds: float) -> float:
    """Bytes per second over each rank's link: a ring sends 2 (n - 1) / n of the data (nccl-tests, PERFORMANCE.md)."""
    return 2 * (ranks - 1) / ranks * bytes_reduced / seconds


def check_all_reduce(
    answers: list[dict[str, Any]], hosts: list[str], joined: list[bool], config: DoctorConfig
) -> Check:
    """`answers`, `hosts` and who `joined` the group at all, by rank. The `error` of a rank without an answer is empty."""
    failing = [rank for rank, answer in enumerate(answers) if "error" in answer]
    if failing:
        absent = [rank for rank, there in enumerate(joined) if not there]
        # Those who are silent are to blame for those who say that they waited in vain.
        blamed = [rank for rank in failing if not answers[rank]["error"]] or failing
        reasons = (answers[rank]["error"] or "fell silent" for rank in blamed)
        named = ", ".join(
            f"rank {rank} on {hosts[rank]}: {why}" for rank, why in zip(blamed[:4], reasons, strict=False)
        )
        who = (
            f"; rank {', '.join(map(str, absent[:8]))} did not join the group"
            if absent
            else "; all had joined the group"
        )
        remedy = (
            "start again with NCCL_DEBUG=INFO (TORCH_CPP_LOG_LEVEL=INFO for gloo) and see which interface it takes; name it "
            "with NCCL_SOCKET_IFNAME or GLOO_SOCKET_IFNAME, or give a longer timeout="
        )
        return failed("all-reduce", named + who, remedy)
    if wrong := [rank for rank, answer in enumerate(answers) if not answer["right"]]:
        remedy = "a defect of hardware or driver: try NCCL_P2P_DISABLE=1, then half of the GPUs, to find which"
        return failed("all-reduce", f"the sum is wrong on rank {', '.join(map(str, wrong))}", remedy)
    slowest = max(median(answer["seconds"]) for answer in answers)
    speed = bus_bandwidth(config.all_reduce_mib * MIB, len(answers), slowest) / 1e9
    told = f"{answers[0]['backend']}, {len(answers)} ranks, {config.all_reduce_mib} MiB in {1000 * slowest:.1f} ms: {speed:.2f} GB/s on the bus"
    # What gloo does between processor cores is slow, and no sign of anything.
    if speed >= config.min_bus_gb_s or answers[0]["backend"] != "nccl":
        return passed("all-reduce", told, speed, "GB/s")
    remedy = (
        f"less than min_bus_gb_s={config.min_bus_gb_s:g}: see `variables`, nvidia-smi topo -m and NCCL_DEBUG=INFO for the way "
        "it takes; on slow links prefer zero=stage1 or stage2, and accumulate"
    )
    return warning("all-reduce", told, remedy, speed, "GB/s")
