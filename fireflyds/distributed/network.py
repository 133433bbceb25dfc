"""The network interface between hosts, said to NCCL and to gloo before the ranks meet."""

from collections.abc import MutableMapping

import psutil

from fireflyds.errors import UserError


def set_network_interface(names: str, environment: MutableMapping[str, str]) -> None:
    """`names` as in `hardware.network_interface`: one or several with commas; empty leaves it to the libraries.

    Raises:
        UserError: no such interface on this host, or the environment already says another.
    """
    if not names:
        return
    there = psutil.net_if_addrs()
    if missing := [name for name in names.split(",") if name not in there]:
        raise UserError(
            f"hardware.network_interface={names}: this host has no {', '.join(missing)}. It has {', '.join(sorted(there))}; "
            "where hosts differ, leave it empty and set NCCL_SOCKET_IFNAME on each"
        )
    # To NCCL a name alone means all that begin so; with `=` it is that one (NCCL user guide, NCCL_SOCKET_IFNAME).
    for variable, value in (("NCCL_SOCKET_IFNAME", f"={names}"), ("GLOO_SOCKET_IFNAME", names)):
        said = environment.get(variable, "")
        if said and said.lstrip("=") != names:
            raise UserError(
                f"hardware.network_interface={names}, but {variable}={said} in the environment. Unset the variable, or leave "
                "hardware.network_interface empty"
            )
        environment[variable] = said or value
