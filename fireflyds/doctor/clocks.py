"""Check of the clock offsets between hosts."""

from fireflyds.distributed.clock_offset import MUNGE_SECONDS, largest_offset
from fireflyds.distributed.host_identity import describe_ranks
from fireflyds.doctor.check import Check, failed, passed, warning


def check_clocks(offsets: dict[int, tuple[float, float]], leaders: list[int], hosts: list[str], limit: float) -> Check:
    """`offsets` of `measure_offsets`; `leaders`: the ranks that were pinged; `hosts` by rank; `limit` in seconds."""
    if unresponsive := [rank for rank in leaders if rank and rank not in offsets]:
        names = describe_ranks(unresponsive, hosts)
        return failed("clock skew", f"unknown: no answer from {names}", "see the log of that rank")
    largest = largest_offset(offsets, hosts)
    if not largest.exceeds(limit):
        text = f"{largest.seconds:.4f} s apart at most, ± {largest.precision:.4f} s"
        return passed("clock skew", text, largest.seconds, "s")
    text = f"{largest.ahead} is {largest.seconds:.3f} s ahead of {largest.behind}, ± {largest.precision:.4f} s"
    remedy = f"more than max_clock_skew={limit:g}: start chronyd or ntpd on all hosts (chronyc makestep, timedatectl)"
    if largest.seconds > MUNGE_SECONDS:
        return failed("clock skew", text, f"{remedy}; Slurm refuses such a host's credentials")
    return warning("clock skew", text, remedy, largest.seconds, "s")
