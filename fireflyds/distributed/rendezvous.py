"""Communication of ranks through a TCP store. No collectives: an unresponsive rank blocks no other and is identified.

Rank 0 calls a step, every rank runs its handler and answers, rank 0 collects the answers. The store is the one that
torch's process group uses afterwards: hosted by rank 0, or under torchrun by its agent.
"""

import contextlib
import json
import os
import socket
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.errors import LostRankError, UserError

# Seconds between two polls of the store: short at first, for accurate clock offsets; longer later, so that thousands of
# ranks do not overload it. The store's own blocking wait is not used: it does not handle Ctrl-C.
_FIRST_POLL, _LAST_POLL = 0.0002, 0.05
# Seconds added to timeouts: answers take time to arrive, and handlers with a timeout start later than rank 0's.
_GRACE = 5.0
_END = "end"
_ADDRESS_KEY = "MASTER_ADDR:MASTER_PORT"

Handler = Callable[[Any], Any]


class UnresponsiveRanksError(Exception):
    """Ranks that did not answer to a step. `answers`: those of the other ranks, by rank."""

    def __init__(self, step: str, ranks: list[int], answers: dict[int, Any]) -> None:
        super().__init__(step, ranks)
        self.step, self.ranks, self.answers = step, ranks, answers


class StoreChannel:
    """One rank's connection to the store.

    Raises:
        UserError: the store cannot be reached or, on rank 0, its port is in use.
    """

    def __init__(self, me: RankInfo, timeout: float) -> None:
        self.me, self.timeout = me, timeout
        self._steps = 0
        hosts_store = me.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not hosts_store:
            _wait_for_store(me, timeout)
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                me.master_addr,
                me.master_port,
                None,
                is_master=hosts_store,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (dist.DistError, ValueError) as error:
            raise _store_error(me, str(error).splitlines()[0]) from error
        # The agent's store outlives a restart of its ranks: a prefix hides the values of earlier attempts.
        self._store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # type: ignore[attr-defined]

    def register(self) -> None:
        """Claim this rank. Raises `UserError` if another process has claimed it."""
        if self._store.add(f"channel/claimed/{self.me.rank}", 1) > 1:
            raise UserError(
                f"rank {self.me.rank} on {socket.gethostname()}: another process has connected to "
                f"{self.me.master_addr}:{self.me.master_port} as the same rank",
                remedy="Give every host its own --node_rank, and every job its own port",
            )

    def set(self, key: str, value: Any) -> None:
        """Store `value` as JSON. Raises `UserError` if the store and rank 0 have ended."""
        try:
            self._store.set(f"channel/{key}", json.dumps(value))
        except dist.DistError as error:
            raise self._rank_zero_left() from error

    def get(self, key: str, seconds: float) -> Any:
        """The value of `key`; waits until a rank has set it.

        Raises:
            TimeoutError: no rank has set it within `seconds`.
            UserError: the store and rank 0 have ended.
        """
        deadline, interval = time.monotonic() + seconds, _FIRST_POLL
        try:
            while not self.has(key):
                if time.monotonic() > deadline:
                    raise TimeoutError(key)
                time.sleep(interval)
                interval = min(1.5 * interval, _LAST_POLL)
            return json.loads(self._store.get(f"channel/{key}"))
        except dist.DistError as error:
            raise self._rank_zero_left() from error

    def _rank_zero_left(self) -> UserError:
        return LostRankError(f"rank {self.me.rank}: rank 0 has left", remedy="See its report or its log for the reason")

    def has(self, key: str) -> bool:
        """True where a rank has set `key`; does not wait."""
        return bool(self._store.check([f"channel/{key}"]))

    def call(self, step: str, payload: Any, part: Handler, seconds: float) -> list[Any]:
        """On rank 0: the answers of all ranks to `step`, by rank; `{"error": ...}` where a handler failed.

        `part` is rank 0's own handler.

        Raises:
            UnresponsiveRanksError: a rank has not answered `seconds` after rank 0's own handler returned.
        """
        self._steps += 1
        self.set(f"call/{self._steps}", [step, payload])
        result = _call_handler(part, payload)
        deadline = time.monotonic() + seconds + _GRACE
        answers, unresponsive = {0: result}, []
        for rank in range(1, self.me.world_size):
            try:
                answers[rank] = self.get(f"answer/{self._steps}/{rank}", max(0.0, deadline - time.monotonic()))
            except TimeoutError:
                unresponsive.append(rank)
        if unresponsive:
            raise UnresponsiveRanksError(step, unresponsive, answers)
        return list(answers.values())

    def serve(self, parts: Mapping[str, Handler], longest: float) -> Any:
        """On other ranks: answer calls until rank 0 ends them, and return its last value.

        `parts`: handlers by step. `longest`: maximum time between two calls, in seconds.

        Raises:
            UserError: no call of rank 0 within `longest` seconds.
        """
        while True:
            self._steps += 1
            try:
                step, payload = self.get(f"call/{self._steps}", longest)
            except TimeoutError as error:
                raise LostRankError(
                    f"rank {self.me.rank}: no message from rank 0 for {longest:g} s",
                    remedy="See its log, or raise the timeout (timeout= of launch/doctor.py, "
                    "hardware.start_timeout_minutes of a run)",
                ) from error
            if step == _END:
                self.set(f"answer/{self._steps}/{self.me.rank}", None)
                return payload
            self.set(f"answer/{self._steps}/{self.me.rank}", _call_handler(parts[step], payload))

    def end(self, last: Any = None) -> None:
        """On rank 0: end `serve` on the other ranks and wait briefly for their answers: the store ends with rank 0."""
        with contextlib.suppress(UnresponsiveRanksError):
            self.call(_END, last, lambda payload: None, 0.0)


def _store_error(me: RankInfo, reason: str) -> LostRankError:
    if "EADDRINUSE" in reason or "already in use" in reason:
        return LostRankError(
            f"the port is taken on rank 0's host {socket.gethostname()}, by another job or a process of an earlier one",
            key=_ADDRESS_KEY,
            value=f"{me.master_addr}:{me.master_port}",
            remedy="Choose another with deepspeed --master_port, torchrun --master_port or MASTER_PORT, the same on "
            "all hosts",
        )
    return LostRankError(
        f"rank {me.rank} on {socket.gethostname()} cannot use this address ({reason})",
        key=_ADDRESS_KEY,
        value=f"{me.master_addr}:{me.master_port}",
        remedy="Give an address of rank 0's host that all hosts can reach, and a free port of that host",
    )


def _wait_for_store(me: RankInfo, timeout: float) -> None:
    """Connect repeatedly until the store accepts: its own client blocks Ctrl-C and fails with a C++ stack trace."""
    deadline, reason, unresolved = time.monotonic() + timeout, "", False
    while time.monotonic() < deadline:
        try:
            socket.create_connection((me.master_addr, me.master_port), max(0.1, deadline - time.monotonic())).close()
            return
        except OSError as error:
            reason, unresolved = str(error), isinstance(error, socket.gaierror)
            time.sleep(0.2)
    remedy = (
        f"Enter {me.master_addr} in DNS or /etc/hosts of this host, or give rank 0's IP address (--master_addr)"
        if unresolved
        else "Check that rank 0 is running, that the address belongs to its host, and that no firewall blocks the port"
    )
    raise LostRankError(
        f"rank {me.rank} on {socket.gethostname()} did not reach rank 0 there within {timeout:g} s ({reason})",
        key=_ADDRESS_KEY,
        value=f"{me.master_addr}:{me.master_port}",
        remedy=remedy,
    )


def _call_handler(handler: Handler, payload: Any) -> Any:
    try:
        return handler(payload)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return {"error": lines[0] if lines else type(error).__name__}
