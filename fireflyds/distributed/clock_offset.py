"""How far the clocks of the hosts differ, measured through the store that the ranks share."""

import time
from dataclasses import dataclass
from typing import Any

from fireflyds.distributed.rendezvous import StoreChannel

_PINGS = 8
# Seconds for each further rank once one did not answer: the others must not give up rank 0 meanwhile.
_SHORT_TIMEOUT = 1.0


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """The two hosts whose clocks differ most: `ahead` is `seconds` ahead of `behind`, known to `precision` seconds."""

    ahead: str
    behind: str
    seconds: float
    precision: float

    def exceeds(self, limit: float) -> bool:
        return self.seconds - self.precision > limit


def ping_request(leaders: list[int], world_size: int) -> dict[str, Any]:
    """`leaders`: the first rank of each host. Where there is one host its last rank answers, to try the way all the same."""
    return {"leaders": leaders if len(leaders) > 1 else [world_size - 1], "pings": _PINGS}


def answer_pings(channel: StoreChannel, request: Any) -> None:
    """The time by this rank's clock, each time rank 0 asks."""
    for number in range(request["pings"] if channel.me.rank in request["leaders"] else 0):
        # Rank 0 may wait for another before.
        channel.get(f"ping/{channel.me.rank}/{number}", 2 * channel.timeout)
        channel.set(f"pong/{channel.me.rank}/{number}", time.time())


def measure_offsets(channel: StoreChannel, request: Any) -> dict[int, tuple[float, float]]:
    """On rank 0: by rank, how far its clock is ahead and the error of that, in seconds. Silent ranks are left out.

    As NTP does (RFC 5905): the answer was written between question and reply, so it is off by half the round trip at
    most; the quickest round trip counts.
    """
    offsets, timeout = {}, channel.timeout
    for rank in request["leaders"]:
        rounds = []
        try:
            for number in range(request["pings"] if rank else 0):
                sent, started = time.time(), time.perf_counter()
                channel.set(f"ping/{rank}/{number}", None)
                received = channel.get(f"pong/{rank}/{number}", timeout)
                round_trip = time.perf_counter() - started
                rounds.append((round_trip / 2, received - (sent + round_trip / 2)))
        except TimeoutError:
            timeout = min(timeout, _SHORT_TIMEOUT)
            continue
        if rounds:
            precision, ahead = min(rounds)
            offsets[rank] = (ahead, precision)
    return offsets


def largest_offset(offsets: dict[int, tuple[float, float]], hosts: list[str]) -> ClockOffset:
    """Of `measure_offsets`, each against rank 0; `hosts` by rank."""
    clocks = {0: (0.0, 0.0)} | offsets
    ahead, behind = max(clocks, key=lambda rank: clocks[rank][0]), min(clocks, key=lambda rank: clocks[rank][0])
    seconds, precision = clocks[ahead][0] - clocks[behind][0], clocks[ahead][1] + clocks[behind][1]
    return ClockOffset(hosts[ahead], hosts[behind], seconds, precision)
