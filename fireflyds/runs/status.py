"""How a run stands, for whoever looks from outside: `status.json`. Launchers do not pass exit codes on faithfully."""

import contextlib
import json
import os
import time
from pathlib import Path

from fireflyds.errors import LostRankError, UserError
from fireflyds.fs import atomic_write_text, read_json

# A scheduler that sees this code may start the same command again.
EXIT_INTERRUPTED = 75
# Somebody wants the run to stay where it is: a scheduler leaves it alone.
EXIT_STOPPED = 76
EXIT_FAILED = 1
_EXIT_CTRL_C = 130


class Status:
    """`state` is `running`, `stopped` (goes on by the same command), `finished` or `failed`. Used as a context.

    Written by rank 0; where that is the rank that is lost, by rank 1.
    """

    def __init__(self, run_dir: Path, rank: int, total_steps: int) -> None:
        self._file, self._rank, self._total_steps = run_dir / "status.json", rank, total_steps
        self.step = 0

    def __enter__(self) -> "Status":
        self.write("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None or issubclass(kind, SystemExit):
            return
        if issubclass(kind, KeyboardInterrupt):
            self.write("stopped", _EXIT_CTRL_C, "interrupted outside of training steps")
        else:
            code = kind.exit_code if issubclass(kind, UserError) else EXIT_FAILED
            self.failed(str(error) or kind.__name__, code, lost=issubclass(kind, LostRankError))

    def write(self, state: str, exit_code: int | None = None, message: str = "") -> None:
        if self._rank == 0:
            self._write(state, exit_code, message)

    def failed(self, message: str, exit_code: int, *, lost: bool = False) -> None:
        """`lost`: another rank or its machine is gone, and the same command goes on."""
        if self._rank == (1 if message.startswith("rank 0 ") else 0) and not (self._rank and self._told_by_rank_zero()):
            # Where the disk is what failed, that is to be said, and not this.
            with contextlib.suppress(OSError):
                self._write("failed", exit_code, message, lost=lost)

    def _told_by_rank_zero(self) -> bool:
        """Cut off from each other, both miss the other; rank 0's word counts."""
        return self._file.is_file() and read_json(self._file)["state"] != "running"

    def _write(self, state: str, exit_code: int | None, message: str, *, lost: bool = False) -> None:
        about = {
            "state": state, "step": self.step, "total_steps": self._total_steps, "exit_code": exit_code,
            "message": message, "lost": lost, "pid": os.getpid(), "time": time.time(),
        }  # fmt: skip
        atomic_write_text(self._file, json.dumps(about, indent=2))
