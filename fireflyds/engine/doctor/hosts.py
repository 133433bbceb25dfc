"""The hosts that the ranks are on, and the ranks that are not where they should be."""

import os
import socket
from pathlib import Path

from fireflyds.engine.doctor.check import Check, green, red, yellow
from fireflyds.engine.meeting import SilentError
from fireflyds.engine.ranks import Ranks

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """The machine's, new at every start of its kernel and the same in all its containers; empty where it tells none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def tell_apart(names: list[str], machines: list[str]) -> list[str]:
    """Host names by rank; machines of one name, as cloned images have, become `north`, `north#2`."""
    seen: dict[str, list[str]] = {}
    told = []
    for name, machine in zip(names, machines, strict=True):
        of_name = seen.setdefault(name, [])
        if machine not in of_name:
            of_name.append(machine)
        number = of_name.index(machine) + 1
        told.append(f"{name}#{number}" if number > 1 else name)
    return told


def check_hosts(hosts: list[str], master_addr: str) -> Check:
    """`hosts` by rank, as `tell_apart` names them."""
    counts = {host: hosts.count(host) for host in dict.fromkeys(hosts)}
    about = f"{len(hosts)} ranks on {len(counts)} host{'s' * (len(counts) > 1)}: "
    about += ", ".join(f"{host} ({count})" for host, count in list(counts.items())[:8])
    about += f" and {len(counts) - 8} more" * (len(counts) > 8)
    if clones := [host for host in counts if "#" in host]:
        names = ", ".join(dict.fromkeys(host.partition("#")[0] for host in clones))
        remedy = "give every node its own name: hostnamectl set-hostname <name>"
        return red("hosts", f"{about}; several machines are called {names}", remedy)
    if len(counts) > 1 and len(set(counts.values())) > 1:
        return yellow("hosts", about, "unless meant so, start as many on every host (--ntasks-per-node, slots=)")
    if len(counts) > 1:
        try:
            own = socket.gethostbyname(hosts[0])
        except OSError:
            remedy = f"enter {hosts[0]} in DNS or /etc/hosts, or set GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME"
            return yellow("hosts", f"{about}; the name {hosts[0]} has no address", remedy)
        if own.startswith("127.") and "GLOO_SOCKET_IFNAME" not in os.environ:
            remedy = (
                "give it its own address in /etc/hosts, or set GLOO_SOCKET_IFNAME: gloo offers the others this address"
            )
            return yellow("hosts", f"{about}; {hosts[0]} is {own} to itself", remedy)
    return green("hosts", f"{about}; MASTER_ADDR is {master_addr}")


def check_silent(silent: SilentError, me: Ranks, hosts: list[str], timeout: float) -> Check:
    """Names the ranks, with their hosts where they have said those, else with the number of their node."""
    local = local_size()
    named = []
    for rank in silent.ranks[:8]:
        where = f" on {hosts[rank]}" if hosts else f" (node {rank // local})" if local else ""
        named.append(f"rank {rank}{where}")
    more = f" and {len(silent.ranks) - 8} more" if len(silent.ranks) > 8 else ""
    step = "come" if silent.step == "here" else f"answered to `{silent.step}`"
    remedy = (
        f"see their logs: were they started, does their host reach MASTER_ADDR={me.master_addr} port {me.master_port}, do "
        "they hang (py-spy dump)? Where starting takes long, give a longer timeout="
    )
    found = f"{', '.join(named)}{more} of {me.world_size}: not {step} within {timeout:g} s; what follows was not tried"
    return red("ranks", found, remedy)


def check_ended() -> Check:
    found = "the launcher ended this rank (SIGTERM) while the ranks were tried: another one has died"
    remedy = (
        "see the other ranks' logs and dmesg: a bus error is a /dev/shm that is too small (Docker: --shm-size=8g), Killed "
        "is too little memory. Or the job was cancelled"
    )
    return red("ranks", found, remedy)


def local_size() -> int:
    """Ranks of a host as the launcher says; 0 where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "0")))
