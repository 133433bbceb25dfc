"""How far the clocks of the hosts differ, judged."""

from fireflyds.distributed.clock_offset import largest_offset
from fireflyds.distributed.host_identity import describe_ranks
from fireflyds.doctor.check import Check, failed, passed, warning

# Slurm's munge refuses credentials that are older than that by the other host's clock, in seconds.
_MUNGE_SECONDS = 300


def check_clocks(offsets: dict[int, tuple[float, float]], leaders: list[int], hosts: list[str], limit: float) -> Check:
    """`leaders` are the ranks that were asked, `offsets` those of `measure_offsets`; `hosts` by rank; `limit` in seconds."""
    if silent := [rank for rank in leaders if rank and rank not in offsets]:
        named = describe_ranks(silent, hosts)
        return failed("clock skew", f"not known: no answer of {named}", "see the log of that rank")
    largest = largest_offset(offsets, hosts)
    if not largest.exceeds(limit):
        text = f"{largest.seconds:.4f} s apart at most, ± {largest.precision:.4f} s"
        return passed("clock skew", text, largest.seconds, "s")
    text = f"{largest.ahead} is {largest.seconds:.3f} s ahead of {largest.behind}, ± {largest.precision:.4f} s"
    remedy = f"more than max_clock_skew={limit:g}: start chronyd or ntpd on all hosts (chronyc makestep, timedatectl)"
    if largest.seconds > _MUNGE_SECONDS:
        return failed("clock skew", text, f"{remedy}; Slurm refuses such a host's credentials")
    return warning("clock skew", text, remedy, largest.seconds, "s")
