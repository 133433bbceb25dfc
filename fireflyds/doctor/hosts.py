"""The hosts that the ranks are on, and the ranks that are not where they should be."""

import os
import socket

from fireflyds.distributed.host_identity import describe_ranks
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.distributed.rendezvous import UnresponsiveRanksError
from fireflyds.doctor.check import Check, failed, passed, warning


def check_hosts(hosts: list[str], master_addr: str) -> Check:
    """`hosts` by rank, as `distinct_host_names` gives them."""
    counts = {host: hosts.count(host) for host in dict.fromkeys(hosts)}
    about = f"{len(hosts)} ranks on {len(counts)} host{'s' * (len(counts) > 1)}: "
    about += ", ".join(f"{host} ({count})" for host, count in list(counts.items())[:8])
    about += f" and {len(counts) - 8} more" * (len(counts) > 8)
    if clones := [host for host in counts if "#" in host]:
        names = ", ".join(dict.fromkeys(host.partition("#")[0] for host in clones))
        remedy = "give every node its own name: hostnamectl set-hostname <name>"
        return failed("hosts", f"{about}; several machines are called {names}", remedy)
    if len(counts) > 1 and len(set(counts.values())) > 1:
        return warning("hosts", about, "unless meant so, start as many on every host (--ntasks-per-node, slots=)")
    if len(counts) > 1:
        try:
            own = socket.gethostbyname(hosts[0])
        except OSError:
            remedy = f"enter {hosts[0]} in DNS or /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            return warning("hosts", f"{about}; the name {hosts[0]} has no address", remedy)
        if own.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
            remedy = (
                "give it its own address in /etc/hosts, or set GLOO_SOCKET_IFNAME: gloo offers the others this address"
            )
            return warning("hosts", f"{about}; {hosts[0]} is {own} to itself", remedy)
    return passed("hosts", f"{about}; MASTER_ADDR is {master_addr}")


def check_unresponsive(silent: UnresponsiveRanksError, me: RankInfo, hosts: list[str], timeout: float) -> Check:
    """Names the ranks, with their hosts where they have said those, else with the number of their node."""
    step = "come" if silent.step == "here" else f"answered to `{silent.step}`"
    remedy = (
        f"see their logs: were they started, does their host reach MASTER_ADDR={me.master_addr} port {me.master_port}, do "
        "they hang (py-spy dump)? Where starting takes long, give a longer timeout="
    )
    found = f"{describe_ranks(silent.ranks, hosts)} of {me.world_size}: not {step} within {timeout:g} s; what follows was not tried"
    return failed("ranks", found, remedy)


def check_terminated() -> Check:
    found = "the launcher ended this rank (SIGTERM) while the ranks were tried: another one has died"
    remedy = (
        "see the other ranks' logs and dmesg: a bus error is a /dev/shm that is too small (Docker: --shm-size=8g), Killed "
        "is too little memory. Or the job was cancelled"
    )
    return failed("ranks", found, remedy)
