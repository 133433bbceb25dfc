"""Ranks that talk through a TCP store. No collective: a rank that is silent holds up nobody, and can be named.

Rank 0 calls a step, every rank takes its part and answers, rank 0 gathers the answers. The store is the one that torch's
process group uses afterwards: kept by rank 0, or under torchrun by its agent.
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

# Seconds between two looks at the store: the first ones quick, for the clocks; never so many that thousands of ranks
# keep it busy. Not the store's own waiting, in which Ctrl-C is not heard.
_FIRST_POLL, _LAST_POLL = 0.0002, 0.05
# Answers travel, and parts that wait for their own timeout begin a little later than rank 0's.
_GRACE = 5.0
_END = "end"

Handler = Callable[[Any], Any]


class UnresponsiveRanksError(Exception):
    """Ranks that did not answer, and by rank what the others did."""

    def __init__(self, step: str, ranks: list[int], answers: dict[int, Any]) -> None:
        super().__init__(step, ranks)
        self.step, self.ranks, self.answers = step, ranks, answers


class StoreChannel:
    """One rank's place in it.

    Raises:
        UserError: the store cannot be reached or, on rank 0, its port is taken.
    """

    def __init__(self, me: RankInfo, timeout: float) -> None:
        self.me, self.timeout = me, timeout
        self._steps = 0
        keeps = me.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        if not keeps:
            _wait_for_store(me, timeout)
        try:
            store = dist.TCPStore(  # type: ignore[attr-defined]
                me.master_addr,
                me.master_port,
                None,
                is_master=keeps,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
                multi_tenant=True,
            )
        except (dist.DistError, ValueError) as error:
            raise LostRankError(_store_error(me, str(error).splitlines()[0])) from error
        # An agent's store outlives a restart of its ranks: what was told before it is old.
        self._store = dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)  # type: ignore[attr-defined]

    def register(self) -> None:
        """Raises `UserError` when another process has come as the same rank."""
        if self._store.add(f"channel/claimed/{self.me.rank}", 1) > 1:
            raise UserError(
                f"rank {self.me.rank} on {socket.gethostname()}: another process has come to {self.me.master_addr}:"
                f"{self.me.master_port} as the same rank. Give every host its own --node_rank, and every job its own port"
            )

    def set(self, key: str, value: Any) -> None:
        """Raises `UserError` when the store is gone, and rank 0 with it."""
        try:
            self._store.set(f"channel/{key}", json.dumps(value))
        except dist.DistError as error:
            raise self._rank_zero_left() from error

    def get(self, key: str, seconds: float) -> Any:
        """What somebody told or will tell under that key.

        Raises:
            TimeoutError: nobody has.
            UserError: the store is gone, and rank 0 with it.
        """
        until, pause = time.monotonic() + seconds, _FIRST_POLL
        try:
            while not self.has(key):
                if time.monotonic() > until:
                    raise TimeoutError(key)
                time.sleep(pause)
                pause = min(1.5 * pause, _LAST_POLL)
            return json.loads(self._store.get(f"channel/{key}"))
        except dist.DistError as error:
            raise self._rank_zero_left() from error

    def _rank_zero_left(self) -> UserError:
        return LostRankError(f"rank {self.me.rank}: rank 0 has left; its report or its log says why")

    def has(self, key: str) -> bool:
        return bool(self._store.check([f"channel/{key}"]))

    def call(self, step: str, payload: Any, part: Handler, seconds: float) -> list[Any]:
        """On rank 0: what every rank answers, by rank; `part` is rank 0's own. `{"error": ...}` where a part failed.

        Raises:
            SilentError: not all have answered `seconds` after rank 0's own part was done.
        """
        self._steps += 1
        self.set(f"call/{self._steps}", [step, payload])
        own = _call_handler(part, payload)
        until = time.monotonic() + seconds + _GRACE
        answers, silent = {0: own}, []
        for rank in range(1, self.me.world_size):
            try:
                answers[rank] = self.get(f"answer/{self._steps}/{rank}", max(0.0, until - time.monotonic()))
            except TimeoutError:
                silent.append(rank)
        if silent:
            raise UnresponsiveRanksError(step, silent, answers)
        return list(answers.values())

    def serve(self, parts: Mapping[str, Handler], longest: float) -> Any:
        """On other ranks: take part until rank 0 ends it, and return its last word. `longest` is what a step may take, in
        seconds.

        Raises:
            UserError: rank 0 says nothing any more.
        """
        while True:
            self._steps += 1
            try:
                step, payload = self.get(f"call/{self._steps}", longest)
            except TimeoutError as error:
                raise LostRankError(
                    f"rank {self.me.rank}: rank 0 has said nothing for {longest:g} s; see its log, or wait longer (timeout= of the doctor, hardware.start_timeout_minutes of a run)"
                ) from error
            if step == _END:
                self.set(f"answer/{self._steps}/{self.me.rank}", None)
                return payload
            self.set(f"answer/{self._steps}/{self.me.rank}", _call_handler(parts[step], payload))

    def end(self, last: Any = None) -> None:
        """On rank 0: let the others go, and wait a moment until they have heard, for the store ends with rank 0."""
        with contextlib.suppress(UnresponsiveRanksError):
            self.call(_END, last, lambda payload: None, 0.0)


def _store_error(me: RankInfo, why: str) -> str:
    place = f"MASTER_ADDR:MASTER_PORT={me.master_addr}:{me.master_port}"
    if "EADDRINUSE" in why or "already in use" in why:
        return (
            f"{place}: the port is taken on rank 0's host {socket.gethostname()}, by another job or by what is left of an "
            "earlier one. Give another with deepspeed --master_port, torchrun --master_port or MASTER_PORT, the same on all hosts"
        )
    return (
        f"{place}: rank {me.rank} on {socket.gethostname()} cannot use them ({why}). MASTER_ADDR must be an address of rank "
        "0's host that all hosts reach, MASTER_PORT a free port there"
    )


def _wait_for_store(me: RankInfo, timeout: float) -> None:
    """Knock until somebody opens: the store's own client would do so deaf to Ctrl-C, and end in a C++ stack trace."""
    until, why, nameless = time.monotonic() + timeout, "", False
    while time.monotonic() < until:
        try:
            socket.create_connection((me.master_addr, me.master_port), max(0.1, until - time.monotonic())).close()
            return
        except OSError as error:
            why, nameless = str(error), isinstance(error, socket.gaierror)
            time.sleep(0.2)
    remedy = (
        f"Enter {me.master_addr} in DNS or /etc/hosts of this host, or give rank 0's address in numbers (--master_addr)"
        if nameless
        else "Look whether rank 0 runs, whether the address is its own, and whether a firewall closes the port"
    )
    raise LostRankError(
        f"MASTER_ADDR:MASTER_PORT={me.master_addr}:{me.master_port}: rank {me.rank} on {socket.gethostname()} did not reach "
        f"rank 0 there within {timeout:g} s ({why}). {remedy}"
    )


def _call_handler(part: Handler, payload: Any) -> Any:
    try:
        return part(payload)
    except Exception as error:
        lines = str(error).strip().splitlines()
        return {"error": lines[0] if lines else type(error).__name__}
