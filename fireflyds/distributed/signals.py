"""What a run is asked to do while it runs: by signals, by files in its folder, by the death of its launcher. All ranks agree."""

import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import psutil
import torch
import torch.distributed as dist

from fireflyds.distributed.launcher_env import is_alive

SAVE, STOP = "SAVE", "STOP"
# A launcher passes a Ctrl-C on as SIGTERM, to processes that the terminal has sent it already.
_ECHO_SECONDS = 1.0
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run", "torch/distributed/run", "torch.distributed.launch")


@dataclass(frozen=True, slots=True)
class StopRequest:
    """What holds for all ranks after a step."""

    save: bool
    stop: bool
    no_requeue: bool
    """It was a file `STOP` that asked: nobody is to start the run again by himself."""
    failed: bool
    """A rank could not write its share of a checkpoint."""


class StopSignals:
    """SIGTERM, SIGUSR1, Ctrl-C, a file `STOP`, a launcher that died: finish the step, save, leave. A file `SAVE`: save.

    A second Ctrl-C, or a second SIGTERM after a second, leaves at once; SIGUSR1, which announces one of these, does not count.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.reason = ""
        self._asked_at: float | None = None
        self._told_at: float | None = None
        self._launchers = _launcher_processes()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        name, now = signal.Signals(number).name, time.monotonic()
        if self._asked_at is None:
            self._asked_at, self.reason = now, name
        if number == signal.SIGUSR1:
            return
        if self._told_at is None:
            self._told_at = now
        elif number == signal.SIGINT or now - self._told_at > _ECHO_SECONDS:
            # Collectives and threads that write would hold an orderly end up.
            os.write(sys.stderr.fileno(), b"interrupted again: leaving at once; the newest checkpoint is whole\n")
            os._exit(128 + number)

    def _look(self) -> tuple[bool, bool, bool]:
        """Whether this rank was asked to save, to stop, and to stay stopped."""
        save = stay = False
        if dist.get_rank() == 0:
            save, stay = (_consume(self._run_dir / name) for name in (SAVE, STOP))
        if stay:
            self.reason = f"{STOP} file"
        if self._asked_at is None and (gone := [each for each in self._launchers if not is_alive(each)]):
            self.reason = f"the launcher (process {gone[0].pid}) is gone"
            self._asked_at = time.monotonic()
        return save, stay or self._asked_at is not None, stay

    def poll(self, device: torch.device, failed: bool) -> StopRequest:
        """What any rank was asked is heard by all. `failed`: this rank could not write its share of a checkpoint."""
        asked = torch.tensor([*self._look(), failed], dtype=torch.int32, device=device)
        dist.all_reduce(asked, op=dist.ReduceOp.MAX)
        return StopRequest(*(bool(value) for value in asked.tolist()))


def _consume(file: Path) -> bool:
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


def _launcher_processes() -> list[psutil.Process]:
    """The ancestors that launched this rank: some of them die without a word to it."""
    found = []
    try:
        for ancestor in psutil.Process().parents():
            if not any(name in word for word in ancestor.cmdline()[:4] for name in _LAUNCHERS):
                break
            found.append(ancestor)
    except psutil.Error:
        pass
    return found
