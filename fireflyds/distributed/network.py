"""Selects the network interface of NCCL and gloo, before the ranks connect."""

from collections.abc import MutableMapping

import psutil

from fireflyds.errors import UserError


def set_network_interface(names: str, environment: MutableMapping[str, str]) -> None:
    """Set the variables of NCCL and gloo in `environment`.

    `names`: as in `hardware.network_interface`, one or several separated by commas; if empty the libraries choose.

    Raises:
        UserError: this host has no such interface, or the environment already sets another.
    """
    if not names:
        return
    present = psutil.net_if_addrs()
    if missing := [name for name in names.split(",") if name not in present]:
        raise UserError(
            f"this host has no {', '.join(missing)}",
            key="hardware.network_interface",
            value=names,
            remedy=f"It has {', '.join(sorted(present))}; where hosts differ, leave it empty and set "
            "NCCL_SOCKET_IFNAME on each",
        )
    # NCCL takes a plain name as a prefix, and `=name` as an exact name (NCCL user guide, NCCL_SOCKET_IFNAME).
    for variable, value in (("NCCL_SOCKET_IFNAME", f"={names}"), ("GLOO_SOCKET_IFNAME", names)):
        current = environment.get(variable, "")
        if current and current.lstrip("=") != names:
            raise UserError(
                f"hardware.network_interface={names}, but {variable}={current} in the environment",
                remedy="Unset the variable, or leave hardware.network_interface empty",
            )
        environment[variable] = current or value
