"""Which host a rank is on: machines may share a name, as cloned images do, and containers of one machine may not."""

import os
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """The machine's, new at every start of its kernel and the same in all its containers; empty where it has none."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def distinct_host_names(names: list[str], boot_ids: list[str]) -> list[str]:
    """Host names by rank; different machines of one name become `north`, `north#2`."""
    machines: dict[str, list[str]] = {}
    distinct = []
    for name, machine in zip(names, boot_ids, strict=True):
        same_name = machines.setdefault(name, [])
        if machine not in same_name:
            same_name.append(machine)
        number = same_name.index(machine) + 1
        distinct.append(f"{name}#{number}" if number > 1 else name)
    return distinct


def local_world_size() -> int:
    """Ranks of this host as the launcher says; 0 where it does not."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "0")))


def describe_ranks(ranks: list[int], hosts: list[str] | None = None) -> str:
    """`rank 3 on north, rank 4 (node 1)`: at most eight, with their hosts by rank where these are known, else the number of
    their node where the launcher says how many ranks a host has."""
    local = local_world_size()
    names = []
    for rank in sorted(ranks)[:8]:
        place = f" on {hosts[rank]}" if hosts else f" (node {rank // local})" if local else ""
        names.append(f"rank {rank}{place}")
    return ", ".join(names) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
