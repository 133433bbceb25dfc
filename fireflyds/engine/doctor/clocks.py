"""How far the clocks of the hosts are apart."""

import time
from typing import Any

from fireflyds.engine.doctor.check import Check, green, red, yellow
from fireflyds.engine.meeting import Meeting

_PINGS = 8
# Slurm's munge refuses credentials that are older than that by the other host's clock, in seconds.
_MUNGE = 300
# Seconds for each further rank once one was waited for in vain: the others must not give up rank 0 meanwhile.
_SHORT = 1.0


def answer_pings(meeting: Meeting, payload: Any) -> None:
    """The time by this rank's clock, each time rank 0 asks."""
    for number in range(payload["pings"] if meeting.me.rank in payload["leaders"] else 0):
        # Rank 0 may wait for another before.
        meeting.hear(f"ping/{meeting.me.rank}/{number}", 2 * meeting.timeout)
        meeting.tell(f"pong/{meeting.me.rank}/{number}", time.time())


def ask_clocks(meeting: Meeting, payload: Any) -> dict[int, tuple[float, float]]:
    """On rank 0: by rank, how far its clock is ahead and how wrong that can be, in seconds. Lacks those who are silent.

    As NTP does (RFC 5905): the answer was written between question and reply, so it is off by half the round trip at
    most; the quickest round trip counts.
    """
    found, patience = {}, meeting.timeout
    for rank in payload["leaders"]:
        rounds = []
        try:
            for number in range(payload["pings"] if rank else 0):
                asked, started = time.time(), time.perf_counter()
                meeting.tell(f"ping/{rank}/{number}", None)
                theirs = meeting.hear(f"pong/{rank}/{number}", patience)
                trip = time.perf_counter() - started
                rounds.append((trip / 2, theirs - (asked + trip / 2)))
        except TimeoutError:
            patience = min(patience, _SHORT)
            continue
        if rounds:
            precision, ahead = min(rounds)
            found[rank] = (ahead, precision)
    return found


def clock_payload(leaders: list[int], world_size: int) -> dict[str, Any]:
    """Where there is but one host, its last rank answers: the way is tried all the same."""
    return {"leaders": leaders if len(leaders) > 1 else [world_size - 1], "pings": _PINGS}


def check_clocks(found: dict[int, tuple[float, float]], leaders: list[int], hosts: list[str], limit: float) -> Check:
    """What `leaders` were asked, and `found` by rank, each against rank 0; `hosts` by rank; `limit` in seconds. The two
    that are furthest apart count."""
    if silent := [rank for rank in leaders if rank and rank not in found]:
        named = ", ".join(f"rank {rank} on {hosts[rank]}" for rank in silent[:8])
        more = f" and {len(silent) - 8} more" * (len(silent) > 8)
        return red("clock skew", f"not known: no answer of {named}{more}", "see the log of that rank")
    clocks = {0: (0.0, 0.0)} | found
    first, last = max(clocks, key=lambda rank: clocks[rank][0]), min(clocks, key=lambda rank: clocks[rank][0])
    apart, precision = clocks[first][0] - clocks[last][0], clocks[first][1] + clocks[last][1]
    if apart - precision <= limit:
        return green("clock skew", f"{apart:.4f} s apart at most, ± {precision:.4f} s", apart, "s")
    found_text = f"{hosts[first]} is {apart:.3f} s ahead of {hosts[last]}, ± {precision:.4f} s"
    remedy = f"more than max_clock_skew={limit:g}: start chronyd or ntpd on all hosts (chronyc makestep, timedatectl)"
    if apart > _MUNGE:
        return red("clock skew", found_text, f"{remedy}; Slurm refuses such a host's credentials")
    return yellow("clock skew", found_text, remedy, apart, "s")
