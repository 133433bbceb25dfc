"""No rank dies silently: each tells that it lives, and the others end, with a message, when one does not."""

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch.distributed as dist

from fireflyds.engine.ranks import Ranks, lives
from fireflyds.engine.status import EXIT_FAILED, Status
from fireflyds.errors import LostRankError, UserError

_INTERVAL = 1.0


class Heartbeat:
    """Used as a context around training. Ranks write to the store that they met at; rank 0 looks at all, all at rank 0.

    A rank that is silent for `seconds`, whose process is gone from this machine, or that said how it failed, ends every
    other: a collective that waits for it cannot be left in another way.
    """

    def __init__(self, me: Ranks, run_dir: Path, seconds: float, status: Status) -> None:
        self._me, self._run_dir, self._seconds, self._status = me, run_dir, seconds, status
        self._store: Any = None
        self._left = threading.Event()
        self._seen: dict[int, tuple[Any, float]] = {}
        self._thread = threading.Thread(target=self._work, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self._me.world_size > 1:
            address, port = self._me.master_addr, self._me.master_port
            # A connection of its own: the process group's may be held by a collective.
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self._seconds))  # type: ignore[attr-defined]
            self._store = dist.PrefixStore("fireflyds", store)  # type: ignore[attr-defined]
            self._beat()
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._store is None:
            return
        if kind is None or issubclass(kind, SystemExit | KeyboardInterrupt | UserError):
            self._leave()
        elif lost := self._lost_soon():
            self._leave()
            raise LostRankError(lost) from error
        else:
            self._tell(f"failed/{self._me.rank}", f"{kind.__name__}: {error}")
            self._leave()

    def _leave(self) -> None:
        self._tell(f"left/{self._me.rank}", "yes")
        self._left.set()

    def _beat(self) -> None:
        about = {"host": socket.gethostname(), "pid": os.getpid(), "step": self._status.step, "time": time.time()}
        self._store.set(f"beat/{self._me.rank}", json.dumps(about))

    def _tell(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except Exception:  # the store went with rank 0, and nobody is left to tell
            self._left.set()

    def _work(self) -> None:
        while not self._left.wait(_INTERVAL):
            lost = self._look()
            # Where it was a collective that failed, the main thread tells; it has this long.
            if lost and not self._left.wait(3 * _INTERVAL):
                if self._me.rank == 0 or lost.startswith("rank 0 "):
                    print(f"error: {lost}", file=sys.stderr, flush=True)
                self._status.failed(lost, EXIT_FAILED)
                os._exit(EXIT_FAILED)

    def _look(self) -> str | None:
        """Beat, and say who is lost."""
        try:
            self._beat()
            others = range(1, self._me.world_size) if self._me.rank == 0 else [0]
            for rank in others:
                if lost := self._examine(rank):
                    self._tell("lost", lost)
                    return lost
            return self._get("lost")
        except Exception as error:
            return self._message(0, f"cannot be reached ({str(error).splitlines()[0]})")

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _examine(self, rank: int) -> str | None:
        if self._get(f"left/{rank}"):
            return None
        if told := self._get(f"failed/{rank}"):
            return self._message(rank, f"failed ({told})")
        beat = self._get(f"beat/{rank}")
        known, since = self._seen.get(rank, (None, time.monotonic()))
        if beat != known or rank not in self._seen:
            self._seen[rank] = (beat, time.monotonic())
        elif time.monotonic() - since > self._seconds:
            return self._message(rank, f"has been silent for {self._seconds:.0f} s")
        if beat:
            about = json.loads(beat)
            here = about["host"] == socket.gethostname()
            if here and not (psutil.pid_exists(about["pid"]) and lives(psutil.Process(about["pid"]))):
                return self._message(
                    rank, f"died (process {about['pid']} on {about['host']}, after step {about['step']})"
                )
        return None

    def _lost_soon(self) -> str | None:
        """Why a collective failed, if it was for a lost rank: that shows within seconds."""
        until = time.monotonic() + 5 * _INTERVAL
        while time.monotonic() < until:
            if lost := self._look():
                return lost
            time.sleep(_INTERVAL / 4)
        return None

    def _message(self, rank: int, what: str) -> str:
        return (
            f"rank {rank} {what}; its log: {self._run_dir}/logs/rank_{rank}.log. The newest checkpoint is whole: the same "
            "command goes on from it"
        )
