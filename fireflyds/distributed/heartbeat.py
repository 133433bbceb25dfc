"""No rank dies silently: each tells that it lives, and the others end, with a message, when one does not."""

import contextlib
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

from fireflyds.distributed.host_identity import boot_id
from fireflyds.distributed.launcher_env import RankInfo, is_alive
from fireflyds.errors import LostRankError, UserError
from fireflyds.runs.status import EXIT_FAILED, Status

_INTERVAL = 1.0
# Ranks that refuse for the same reason each wait for their checkpoint first.
_REFUSED_SECONDS = 90.0
# Beats that a rank may miss when a collective has failed.
_MISSED_BEATS = 4


def process_namespace() -> str:
    """Where numbers of processes mean the same: names of hosts may be alike, as cloned images have them."""
    return f"{boot_id()}/{os.stat('/proc/self/ns/pid').st_ino}"


def _pid_is_alive(number: int) -> bool:
    try:
        return is_alive(psutil.Process(number))
    except psutil.NoSuchProcess:
        return False


class Heartbeat:
    """Used as a context around training. Ranks write to the store that they met at; rank 0 looks at all, all at rank 0.

    A rank that is silent for `seconds`, whose process is gone from this machine, or that said how it failed, ends every
    other: a collective that waits for it cannot be left in another way.
    """

    def __init__(self, me: RankInfo, run_dir: Path, seconds: float, status: Status) -> None:
        self._me, self._run_dir, self._seconds, self._status = me, run_dir, seconds, status
        self._store: Any = None
        self._left = threading.Event()
        self._seen: dict[int, tuple[Any, float]] = {}
        self._refused_at: dict[int, float] = {}
        self._looked = time.monotonic()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("heartbeat", self._work), ("heartbeat watch", self._watch))
        ]

    def __enter__(self) -> "Heartbeat":
        if self._me.world_size > 1:
            address, port = self._me.master_addr, self._me.master_port
            # The store of torchrun's agent outlives a restart of the ranks, which must not hear who was lost before.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            # A connection of its own: the process group's may be held by a collective.
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self._seconds))  # type: ignore[attr-defined]
            self._store = dist.PrefixStore(f"fireflyds/{attempt}", store)  # type: ignore[attr-defined]
            self._beat()
            if self._me.rank:
                # Cut off before the first look, it still knows whose host it misses. Rank 0 beats as it comes here.
                with contextlib.suppress(dist.DistError):
                    self._seen[0] = (self._store.get("beat/0").decode(), time.monotonic())
            self._looked = time.monotonic()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self._store is None:
            return
        if kind is None or issubclass(kind, SystemExit | KeyboardInterrupt | UserError):
            if kind is not None and issubclass(kind, UserError) and not issubclass(kind, LostRankError):
                self._tell(f"refused/{self._me.rank}", str(error))
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
        for thread in self._threads:
            # One that asks the store while the process ends would abort it.
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(5 * _INTERVAL)

    def _beat(self) -> None:
        about = {
            "host": socket.gethostname(), "machine": process_namespace(), "pid": os.getpid(), "step": self._status.step, "time": time.time(),
        }  # fmt: skip
        self._store.set(f"beat/{self._me.rank}", json.dumps(about))

    def _tell(self, key: str, value: str) -> None:
        try:
            self._store.set(key, value)
        except Exception:  # the store went with rank 0, and nobody is left to tell
            self._left.set()

    def _work(self) -> None:
        while not self._left.wait(_INTERVAL):
            lost = self._look()
            self._looked = time.monotonic()
            # Where it was a collective that failed, the main thread tells; it has this long.
            if lost and not self._left.wait(3 * _INTERVAL):
                self._end(lost)

    def _watch(self) -> None:
        """The store is asked in a thread that hangs with it: over a link that is down its client waits for ever."""
        while not self._left.wait(_INTERVAL):
            # Rank 0's side speaks first: it knows whom it misses.
            if time.monotonic() - self._looked > self._seconds + 5 * _INTERVAL:
                self._end(self._unreachable(f"no answer for {self._seconds:.0f} s"))

    def _end(self, lost: str) -> None:
        if self._me.rank == 0 or lost.startswith("rank 0 "):
            print(f"error: {lost}", file=sys.stderr, flush=True)
        # The disk may have gone with the host that is lost.
        work = threading.Thread(
            target=self._status.failed, args=(lost, EXIT_FAILED), kwargs={"lost": True}, daemon=True
        )
        work.start()
        work.join(5 * _INTERVAL)
        os._exit(EXIT_FAILED)

    def _unreachable(self, why: str) -> str:
        return self._message(
            0, f"cannot be reached from {socket.gethostname()} at {self._me.master_addr}:{self._me.master_port} ({why})"
        )

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
            return self._unreachable(str(error).splitlines()[0])

    def _get(self, key: str) -> str | None:
        return self._store.get(key).decode() if self._store.check([key]) else None

    def _examine(self, rank: int) -> str | None:
        if self._get(f"left/{rank}"):
            return self._refused(rank)
        beat = self._get(f"beat/{rank}")
        if told := self._get(f"failed/{rank}"):
            self._seen[rank] = (beat, time.monotonic())
            return self._message(rank, f"failed ({told})")
        known, since = self._seen.get(rank, (None, time.monotonic()))
        if beat != known or rank not in self._seen:
            self._seen[rank] = (beat, time.monotonic())
        elif time.monotonic() - since > (limit := self._patience()):
            return self._message(rank, f"has been silent for {limit:.0f} s")
        if beat:
            about = json.loads(beat)
            if about["machine"] == process_namespace() and not _pid_is_alive(about["pid"]):
                return self._message(rank, f"died (process {about['pid']}, after step {about['step']})")
        return None

    def _refused(self, rank: int) -> str | None:
        """A rank that refused alone, such as for a file that its host lacks, is waited for in vain."""
        told = self._get(f"refused/{rank}")
        if told is None or time.monotonic() - self._refused_at.setdefault(rank, time.monotonic()) <= _REFUSED_SECONDS:
            return None
        return self._message(rank, f"refused ({told})")

    def _patience(self) -> float:
        """Once a collective has failed somewhere, whoever no longer beats is the one that it failed for."""
        return min(self._seconds, _MISSED_BEATS * _INTERVAL) if self._get("trouble") else self._seconds

    def _lost_soon(self) -> str | None:
        """Why a collective failed, if it was for a lost rank: that shows within seconds."""
        self._tell("trouble", "yes")
        until = time.monotonic() + 8 * _INTERVAL
        while time.monotonic() < until:
            if lost := self._look():
                return lost
            time.sleep(_INTERVAL / 4)
        return None

    def _message(self, rank: int, what: str) -> str:
        beat, _ = self._seen.get(rank, (None, 0.0))
        host = f" on {json.loads(beat)['host']}" if beat else ""
        return (
            f"rank {rank}{host} {what}; its log: {self._run_dir}/logs/rank_{rank}.log. The newest checkpoint is whole: the same "
            "command goes on from it"
        )
