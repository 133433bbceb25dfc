"""Checks of the hosts of all ranks, and reports of ranks that did not respond or were terminated."""

import os
import socket

from fireflyds.distributed.host_identity import describe_ranks
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.distributed.rendezvous import UnresponsiveRanksError
from fireflyds.doctor.check import Check, failed, passed, warning


def check_hosts(hosts: list[str], master_addr: str) -> Check:
    """Checks host names, addresses and ranks per host. `hosts` by rank, from `distinct_host_names`."""
    counts = {host: hosts.count(host) for host in dict.fromkeys(hosts)}
    summary = f"{len(hosts)} ranks on {len(counts)} host{'s' * (len(counts) > 1)}: "
    summary += ", ".join(f"{host} ({count})" for host, count in list(counts.items())[:8])
    summary += f" and {len(counts) - 8} more" * (len(counts) > 8)
    if clones := [host for host in counts if "#" in host]:
        names = ", ".join(dict.fromkeys(host.partition("#")[0] for host in clones))
        remedy = "give every node its own name: hostnamectl set-hostname <name>"
        return failed("hosts", f"{summary}; several machines are called {names}", remedy)
    if len(counts) > 1 and len(set(counts.values())) > 1:
        return warning(
            "hosts", summary, "if unintended, start equally many ranks on every host (--ntasks-per-node, slots=)"
        )
    if len(counts) > 1:
        try:
            address = socket.gethostbyname(hosts[0])
        except OSError:
            remedy = f"enter {hosts[0]} in DNS or /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            return warning("hosts", f"{summary}; the name {hosts[0]} has no address", remedy)
        if address.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
            remedy = "give it its own address in /etc/hosts, or set GLOO_SOCKET_IFNAME: the others get this address"
            return warning("hosts", f"{summary}; {hosts[0]} resolves its own name to {address}", remedy)
    return passed("hosts", f"{summary}; MASTER_ADDR is {master_addr}")


def check_unresponsive(silent: UnresponsiveRanksError, me: RankInfo, hosts: list[str], timeout: float) -> Check:
    """Names the ranks that did not respond, with their hosts where known, else with the index of their node."""
    step = "connect" if silent.step == "identify" else f"answer `{silent.step}`"
    remedy = (
        f"see their logs: were they started, does their host reach MASTER_ADDR={me.master_addr} port {me.master_port}, "
        "do they hang (py-spy dump)? If startup is slow, increase timeout="
    )
    message = (
        f"{describe_ranks(silent.ranks, hosts)} of {me.world_size}: did not {step} within {timeout:g} s; later "
        "checks skipped"
    )
    return failed("ranks", message, remedy)


def check_terminated() -> Check:
    """An error: the launcher sent SIGTERM to this rank during the checks."""
    message = "the launcher terminated this rank (SIGTERM) during the checks: another rank has failed"
    remedy = (
        "see the other ranks' logs and dmesg: a bus error means that /dev/shm is too small (Docker: --shm-size=8g), "
        "Killed means out of memory. The job may also have been cancelled"
    )
    return failed("ranks", message, remedy)
