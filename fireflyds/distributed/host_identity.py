"""Host identity of a rank. Host names do not suffice: cloned images share one, containers of a machine may differ."""

import os
from collections.abc import Mapping
from pathlib import Path

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")


def boot_id() -> str:
    """The kernel's boot ID: new at every boot, the same in all containers of a machine; empty if it cannot be read."""
    try:
        return _BOOT_ID.read_text().strip()
    except OSError:
        return ""


def distinct_host_names(names: list[str], boot_ids: list[str]) -> list[str]:
    """Unique host names by rank: different machines with the same name become `north`, `north#2`."""
    machines: dict[str, list[str]] = {}
    distinct = []
    for name, machine in zip(names, boot_ids, strict=True):
        same_name = machines.setdefault(name, [])
        if machine not in same_name:
            same_name.append(machine)
        number = same_name.index(machine) + 1
        distinct.append(f"{name}#{number}" if number > 1 else name)
    return distinct


def local_world_size(environment: Mapping[str, str] = os.environ) -> int:
    """Number of ranks on this host according to the launcher's variables; 0 if they are not set."""
    return int(environment.get("LOCAL_WORLD_SIZE") or environment.get("LOCAL_SIZE") or 0)


def describe_ranks(ranks: list[int], hosts: list[str] | None = None) -> str:
    """A text such as `rank 3 on north` or `rank 4 (node 1)`, of at most eight ranks.

    `hosts`: host names by rank. Without them the node number, if the launcher sets the number of ranks per host.
    """
    ranks_per_host = local_world_size()
    names = []
    for rank in sorted(ranks)[:8]:
        location = f" on {hosts[rank]}" if hosts else f" (node {rank // ranks_per_host})" if ranks_per_host else ""
        names.append(f"rank {rank}{location}")
    return ", ".join(names) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
