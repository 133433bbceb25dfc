"""Detection of lost ranks: each rank writes heartbeats, and the others end with an error message when these stop."""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import psutil
import torch.distributed as dist

from fireflyds.distributed.host_identity import boot_id
from fireflyds.distributed.launcher_env import RankInfo, is_alive
from fireflyds.errors import LostRankError, UserError
from fireflyds.runs.layout import EXIT_FAILED, log_file
from fireflyds.runs.status import Status

_INTERVAL = 1.0
# Seconds for the others to end too after a rank ended with a `UserError`: each waits for its checkpoint first.
_REFUSAL_SECONDS = 90.0
# Heartbeats that a rank may miss after a collective has failed.
_MAX_MISSED_BEATS = 4


def process_namespace() -> str:
    """Identifier of the PID namespace. Host names do not suffice: machines with cloned images share one."""
    return f"{boot_id()}/{os.stat('/proc/self/ns/pid').st_ino}"


def _pid_is_alive(number: int) -> bool:
    try:
        return is_alive(psutil.Process(number))
    except psutil.NoSuchProcess:
        return False


class Heartbeat:
    """A context manager around training. Ranks write heartbeats to the store of the rendezvous; rank 0 monitors all
    ranks, and all monitor rank 0.

    All other ranks end when a rank is silent for `seconds`, when its process on this machine has ended, or when it has
    reported a failure: a collective that waits for it cannot be aborted in another way.
    """

    def __init__(self, me: RankInfo, run_dir: Path, seconds: float, status: Status) -> None:
        self._me, self._run_dir, self._seconds, self._status = me, run_dir, seconds, status
        self.store: Any = None
        self.left = threading.Event()
        self.seen: dict[int, tuple[Any, float]] = {}
        self._refused_at: dict[int, float] = {}
        self._last_check = time.monotonic()
        self._threads = [
            threading.Thread(target=work, name=name, daemon=True)
            for name, work in (("heartbeat", self._monitor), ("heartbeat watch", self.watch_monitor))
        ]

    def __enter__(self) -> "Heartbeat":
        if self._me.world_size > 1:
            address, port = self._me.master_addr, self._me.master_port
            # The store of torchrun's agent outlives a restart of the ranks: a prefix hides earlier attempts.
            attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
            # A separate connection: that of the process group may be blocked by a collective.
            store = dist.TCPStore(address, port, is_master=False, timeout=timedelta(seconds=self._seconds))  # type: ignore[attr-defined]
            self.store = dist.PrefixStore(f"fireflyds/{attempt}", store)  # type: ignore[attr-defined]
            self._beat()
            if self._me.rank:
                # Waits for the first heartbeat of rank 0: its host is then known when the connection is lost.
                with contextlib.suppress(dist.DistError):
                    self.seen[0] = (self.store.get("beat/0").decode(), time.monotonic())
            self._last_check = time.monotonic()
            for thread in self._threads:
                thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if self.store is None:
            return
        if kind is None or issubclass(kind, SystemExit | KeyboardInterrupt | UserError):
            if kind is not None and issubclass(kind, UserError) and not issubclass(kind, LostRankError):
                self._publish(f"refused/{self._me.rank}", str(error))
            self._stop_threads()
        elif lost := self.wait_for_lost_rank():
            self._stop_threads()
            raise lost from error
        else:
            self._publish(f"failed/{self._me.rank}", f"{kind.__name__}: {error}")
            self._stop_threads()

    def _stop_threads(self) -> None:
        self._publish(f"left/{self._me.rank}", "yes")
        self.left.set()
        for thread in self._threads:
            # A thread that uses the store while the process ends would abort it.
            if thread.is_alive() and thread is not threading.current_thread():
                thread.join(5 * _INTERVAL)

    def _beat(self) -> None:
        metadata = {
            "host": socket.gethostname(),
            "machine": process_namespace(),
            "pid": os.getpid(),
            "step": self._status.step,
            "time": time.time(),
        }
        self.store.set(f"beat/{self._me.rank}", json.dumps(metadata))

    def _publish(self, key: str, value: str) -> None:
        try:
            self.store.set(key, value)
        except Exception:  # the store ended with rank 0: no rank can read the value
            self.left.set()

    def _monitor(self) -> None:
        while not self.left.wait(_INTERVAL):
            lost = self.look()
            self._last_check = time.monotonic()
            # If a collective failed because of it, the main thread raises the error, within this time.
            if lost and not self.left.wait(3 * _INTERVAL):
                self.end_process(lost)

    def watch_monitor(self) -> None:
        """Ends the process if `_monitor` hangs: the store's client blocks forever when the network link is down."""
        while not self.left.wait(_INTERVAL):
            # Later than rank 0, whose message names the lost rank.
            if time.monotonic() - self._last_check > self._seconds + 5 * _INTERVAL:
                self.end_process(self._unreachable(f"no answer for {self._seconds:.0f} s"))

    def end_process(self, lost: LostRankError) -> None:
        """Prints and records the error and ends this process, also where the disk is unreachable."""
        if self._me.rank == 0 or lost.rank == 0:
            print(f"error: {lost}", file=sys.stderr, flush=True)
        # The disk may be unreachable together with the lost host.
        writer = threading.Thread(target=self._status.failed, args=(lost,), daemon=True)
        writer.start()
        writer.join(5 * _INTERVAL)
        os._exit(EXIT_FAILED)

    def _unreachable(self, reason: str) -> LostRankError:
        return self._lost(
            0,
            f"cannot be reached from {socket.gethostname()} at {self._me.master_addr}:{self._me.master_port} "
            f"({reason})",
        )

    def look(self) -> LostRankError | None:
        """Write a heartbeat. Returns the error of a lost rank, or None."""
        try:
            self._beat()
            others = range(1, self._me.world_size) if self._me.rank == 0 else [0]
            for rank in others:
                if lost := self._check_rank(rank):
                    self._publish("lost", json.dumps(lost.as_dict()))
                    return lost
            published = self._get("lost")
            return cast(LostRankError, UserError.from_dict(json.loads(published))) if published else None
        except Exception as error:
            return self._unreachable(str(error).splitlines()[0])

    def _get(self, key: str) -> str | None:
        return self.store.get(key).decode() if self.store.check([key]) else None

    def _check_rank(self, rank: int) -> LostRankError | None:
        """Returns an error if `rank` is lost, else None."""
        if self._get(f"left/{rank}"):
            return self._check_refused(rank)
        beat = self._get(f"beat/{rank}")
        if failure := self._get(f"failed/{rank}"):
            self.seen[rank] = (beat, time.monotonic())
            return self._lost(rank, f"failed ({failure})")
        last_beat, since = self.seen.get(rank, (None, time.monotonic()))
        if beat != last_beat or rank not in self.seen:
            self.seen[rank] = (beat, time.monotonic())
        elif time.monotonic() - since > (limit := self._silence_limit()):
            return self._lost(rank, f"has been silent for {limit:.0f} s")
        if beat:
            metadata = json.loads(beat)
            if metadata["machine"] == process_namespace() and not _pid_is_alive(metadata["pid"]):
                return self._lost(rank, f"died (process {metadata['pid']}, after step {metadata['step']})")
        return None

    def _check_refused(self, rank: int) -> LostRankError | None:
        """Returns an error if `rank` alone ended with a `UserError` (such as for a missing file), else None."""
        refusal = self._get(f"refused/{rank}")
        if (
            refusal is None
            or time.monotonic() - self._refused_at.setdefault(rank, time.monotonic()) <= _REFUSAL_SECONDS
        ):
            return None
        return self._lost(rank, f"refused ({refusal})")

    def _silence_limit(self) -> float:
        """Seconds without a heartbeat after which a rank is lost; fewer once a collective has failed on some rank."""
        return min(self._seconds, _MAX_MISSED_BEATS * _INTERVAL) if self._get("trouble") else self._seconds

    def wait_for_lost_rank(self) -> LostRankError | None:
        """Returns an error if a collective failed because of a lost rank, which shows within seconds, else None."""
        self._publish("trouble", "yes")
        deadline = time.monotonic() + 8 * _INTERVAL
        while time.monotonic() < deadline:
            if lost := self.look():
                return lost
            time.sleep(_INTERVAL / 4)
        return None

    def _lost(self, rank: int, event: str) -> LostRankError:
        beat, _ = self.seen.get(rank, (None, 0.0))
        host = f" on {json.loads(beat)['host']}" if beat else ""
        return LostRankError(
            f"rank {rank}{host} {event}; its log: {log_file(self._run_dir, rank)}",
            rank=rank,
            remedy="The newest checkpoint is intact: the same command resumes from it",
        )
