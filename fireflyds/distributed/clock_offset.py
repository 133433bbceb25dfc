"""Clock offsets between hosts, measured through the TCP store that all ranks use."""

import time
from dataclasses import dataclass
from typing import Any

from fireflyds.distributed.rendezvous import StoreChannel

# Maximum age in seconds of credentials that Slurm's munge accepts, by the clock of the receiving host.
MUNGE_SECONDS = 300
_PINGS = 8
# Timeout in seconds of each further rank once one did not answer, so that the others do not time out on rank 0.
_SHORT_TIMEOUT = 1.0


@dataclass(frozen=True, slots=True)
class ClockOffset:
    """The largest clock offset: host `ahead` is `seconds` ahead of host `behind`, accurate to `precision` seconds."""

    ahead: str
    behind: str
    seconds: float
    precision: float

    def exceeds(self, limit: float) -> bool:
        """True where the offset is larger than `limit` seconds even after subtracting its measurement error."""
        return self.seconds - self.precision > limit


def ping_request(leaders: list[int], world_size: int) -> dict[str, Any]:
    """The request of rank 0 to all ranks. `leaders`: the first rank of each host. With a single host its last rank
    answers, so that the exchange is tested there too."""
    return {"leaders": leaders if len(leaders) > 1 else [world_size - 1], "pings": _PINGS}


def answer_pings(channel: StoreChannel, request: Any) -> None:
    """Answers each ping of rank 0 with this rank's time, in seconds since the epoch."""
    for number in range(request["pings"] if channel.me.rank in request["leaders"] else 0):
        # Rank 0 may still be waiting for another rank.
        channel.get(f"ping/{channel.me.rank}/{number}", 2 * channel.timeout)
        channel.set(f"pong/{channel.me.rank}/{number}", time.time())


def measure_offsets(channel: StoreChannel, request: Any) -> dict[int, tuple[float, float]]:
    """On rank 0: by rank, the offset of its clock (positive: ahead) and the error of that, in seconds.

    As in NTP (RFC 5905): the answer was written between request and receipt, so the error is at most half the round
    trip; the shortest round trip counts. Ranks that do not answer are left out.
    """
    offsets, timeout = {}, channel.timeout
    for rank in request["leaders"]:
        measurements = []
        try:
            for number in range(request["pings"] if rank else 0):
                sent, started = time.time(), time.perf_counter()
                channel.set(f"ping/{rank}/{number}", None)
                received = channel.get(f"pong/{rank}/{number}", timeout)
                round_trip = time.perf_counter() - started
                measurements.append((round_trip / 2, received - (sent + round_trip / 2)))
        except TimeoutError:
            timeout = min(timeout, _SHORT_TIMEOUT)
            continue
        if measurements:
            precision, ahead = min(measurements)
            offsets[rank] = (ahead, precision)
    return offsets


def largest_offset(offsets: dict[int, tuple[float, float]], hosts: list[str]) -> ClockOffset:
    """The largest offset between two hosts. `offsets`: of `measure_offsets`, relative to rank 0; `hosts`: by rank."""
    clocks = {0: (0.0, 0.0)} | offsets
    ahead, behind = max(clocks, key=lambda rank: clocks[rank][0]), min(clocks, key=lambda rank: clocks[rank][0])
    seconds, precision = clocks[ahead][0] - clocks[behind][0], clocks[ahead][1] + clocks[behind][1]
    return ClockOffset(hosts[ahead], hosts[behind], seconds, precision)
