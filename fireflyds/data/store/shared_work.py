"""Deals out the parts of a store to processes on several machines, through a folder that all of them see.

A process claims a part with a file and touches that file while it works. A claim that nobody touches any more is of a
process that was lost, and another one takes it. Every process encodes with its own workers; the parts have the same
bytes whoever makes them.
"""

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fireflyds.fs import atomic_write_text

_TOUCH_SECONDS = 3.0
POLL_SECONDS = 0.5


class Claims:
    """The claims of this process on parts, in a folder. A thread touches them until they are released.

    `lost_after`: a claim that was not touched for as many seconds is of a lost process.
    """

    def __init__(self, folder: Path, lost_after: float) -> None:
        self._folder, self._lost_after = folder, lost_after
        self._name = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._held: set[str] = set()
        # The clock of the file system, which machines may not agree with.
        self._clock = folder / f"{self._name}.clock"
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._touch_all, daemon=True)

    def __enter__(self) -> "Claims":
        # Its parent is the folder of the unfinished store: where that is gone, there is nothing to claim.
        with contextlib.suppress(FileNotFoundError):
            self._folder.mkdir(exist_ok=True)
            self._clock.touch()
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stopped.set()
        self._thread.join()
        for key in list(self._held):
            self.release(key)
        self._clock.unlink(missing_ok=True)

    def _file(self, key: str) -> Path:
        return self._folder / f"{key}.claim"

    def _touch_all(self) -> None:
        while not self._stopped.wait(_TOUCH_SECONDS):
            for file in (self._clock, *(self._file(key) for key in list(self._held))):
                with contextlib.suppress(OSError):
                    os.utime(file)

    def take(self, key: str) -> bool:
        """Claims a part; False where another living process holds it."""
        file = self._file(key)
        for _ in range(2):
            try:
                descriptor = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
            except FileExistsError:
                if not self._is_lost(file):
                    return False
                # Only one of several processes can rename it.
                with contextlib.suppress(OSError):
                    file.rename(file.with_name(f"{file.name}.{self._name}"))
                    file.with_name(f"{file.name}.{self._name}").unlink(missing_ok=True)
                continue
            with os.fdopen(descriptor, "w") as stream:
                stream.write(self._name)
            self._held.add(key)
            return True
        return False

    def is_lost(self, key: str) -> bool:
        """True where the process that claimed a part does not live any more."""
        return self._is_lost(self._file(key))

    def _is_lost(self, file: Path) -> bool:
        try:
            os.utime(self._clock)
            return self._clock.stat().st_mtime - file.stat().st_mtime > self._lost_after
        except FileNotFoundError:  # released meanwhile
            return False

    def release(self, key: str) -> None:
        """Gives a part back, finished or not."""
        self._held.discard(key)
        self._file(key).unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class SharedPlace:
    """The place of this process among those that share the work, and its claims."""

    rank: int
    size: int
    claims: Claims


def deal(place: SharedPlace, folder: Path, keys: Iterable[str]) -> Iterator[str | None]:
    """Yields the parts that this process is to make, until every part is finished by somebody; None while it must wait.

    A part is finished when its `.json` is there. Every process begins at another part.
    """
    unfinished = list(keys)
    start = place.rank * len(unfinished) // place.size
    unfinished = unfinished[start:] + unfinished[:start]
    while unfinished:
        waiting = []
        for key in unfinished:
            if (folder / f"{key}.json").exists():
                continue
            if not place.claims.take(key):
                waiting.append(key)
            elif (folder / f"{key}.json").exists():  # finished between the two looks
                place.claims.release(key)
            else:
                yield key
        unfinished = waiting
        if unfinished:
            yield None
            time.sleep(POLL_SECONDS)


class Board:
    """Files beside the store by which process 0 tells each of the others what is to be made, and how it ended.

    Each process removes its file when it has seen the end, however late it started. `job`: what the processes of one
    start have in common, so that a file of an earlier start does not count.
    """

    def __init__(self, out: Path, job: str) -> None:
        self._out, self._job = out.resolve(), job

    def _file(self, rank: int | str) -> Path:
        return self._out.with_name(f".{self._out.name}.work.{rank}.json")

    def clear(self) -> None:
        """Removes the files of earlier starts, which lost processes left."""
        for file in self._out.parent.glob(self._file("*").name):
            file.unlink(missing_ok=True)

    def write(self, size: int, state: str, **content: Any) -> None:
        """Writes `state` for the processes 1 to `size` - 1: `planning`, `work` with the parts to make, `done` or
        `failed`."""
        self._out.parent.mkdir(parents=True, exist_ok=True)
        for rank in range(1, size):
            atomic_write_text(self._file(rank), json.dumps({"job": self._job, "state": state, **content}))

    def read(self, rank: int) -> dict[str, Any] | None:
        """Returns what process 0 wrote in this start; None where it has not yet."""
        try:
            content: dict[str, Any] = json.loads(self._file(rank).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return content if content.get("job") == self._job else None

    def seen(self, rank: int) -> None:
        """Removes the file of a process that has seen the end."""
        self._file(rank).unlink(missing_ok=True)


def job_of(environment: Mapping[str, str]) -> str:
    """Returns what the processes of one start have in common: Slurm's step, or torchrun's address."""
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
    names = (*slurm, "TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT")
    return " ".join(f"{name}={environment[name]}" for name in names if name in environment)
