"""Requests to save or stop a run: signals, files in its folder, or the end of its launcher. All ranks agree on them."""

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
from fireflyds.runs import layout

# A launcher forwards Ctrl-C as SIGTERM to processes that have received SIGINT from the terminal: seconds in which a
# SIGTERM does not count as a second request.
_ECHO_SECONDS = 1.0
_LAUNCHERS = ("deepspeed", "torchrun", "torch.distributed.run", "torch/distributed/run", "torch.distributed.launch")


@dataclass(frozen=True, slots=True)
class StopRequest:
    """The combined requests of all ranks after a step."""

    save: bool
    stop: bool
    no_requeue: bool
    """The request is a file `STOP`: the job must not be requeued automatically."""
    failed: bool
    """A rank could not write its shard of a checkpoint."""


class StopSignals:
    """Requests at this rank. SIGTERM, SIGUSR1, Ctrl-C, a file `STOP`, or the end of the launcher: finish the step, save
    and exit. A file `SAVE`: save.

    A second Ctrl-C, or a second SIGTERM more than a second later, exits immediately. SIGUSR1, which announces one of
    these, does not count.
    """

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.reason = ""
        self._stop_requested_at: float | None = None
        self._first_signal_at: float | None = None
        self._launchers = _launcher_processes()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.handle_signal)

    def handle_signal(self, number: int, frame: FrameType | None) -> None:
        """Signal handler: records the request; a second Ctrl-C ends the process at once."""
        name, now = signal.Signals(number).name, time.monotonic()
        if self._stop_requested_at is None:
            self._stop_requested_at, self.reason = now, name
        if number == signal.SIGUSR1:
            return
        if self._first_signal_at is None:
            self._first_signal_at = now
        elif number == signal.SIGINT or now - self._first_signal_at > _ECHO_SECONDS:
            # Collectives and writing threads would delay an orderly exit.
            os.write(sys.stderr.fileno(), b"interrupted again: leaving at once; the newest checkpoint is intact\n")
            os._exit(128 + number)

    def _look(self) -> tuple[bool, bool, bool]:
        """Returns the requests at this rank: to save, to stop, and to stop without requeueing."""
        save = no_requeue = False
        if dist.get_rank() == 0:
            save, no_requeue = (_consume(self._run_dir / name) for name in (layout.SAVE_FILE, layout.STOP_FILE))
        if no_requeue:
            self.reason = f"{layout.STOP_FILE} file"
        if self._stop_requested_at is None and (
            ended := [process for process in self._launchers if not is_alive(process)]
        ):
            self.reason = f"the launcher (process {ended[0].pid}) is gone"
            self._stop_requested_at = time.monotonic()
        return save, no_requeue or self._stop_requested_at is not None, no_requeue

    def poll(self, device: torch.device, failed: bool) -> StopRequest:
        """Combines the requests of all ranks. `failed`: this rank could not write its shard of a checkpoint."""
        flags = torch.tensor([*self._look(), failed], dtype=torch.int32, device=device)
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        return StopRequest(*(bool(value) for value in flags.tolist()))


def _consume(file: Path) -> bool:
    """Removes `file`. Returns True if it existed."""
    try:
        file.unlink()
    except FileNotFoundError:
        return False
    return True


def _launcher_processes() -> list[psutil.Process]:
    """The ancestors of this process that belong to its launcher: some of them end without a signal to the ranks."""
    launchers = []
    try:
        for ancestor in psutil.Process().parents():
            if not any(name in argument for argument in ancestor.cmdline()[:4] for name in _LAUNCHERS):
                break
            launchers.append(ancestor)
    except psutil.Error:
        pass
    return launchers
