"""The status of a run in `status.json`, for monitoring: launchers do not reliably pass on exit codes."""

import contextlib
import json
import os
import time
from pathlib import Path

from fireflyds.errors import LostRankError, UserError
from fireflyds.fs import atomic_write_text, read_json

# A scheduler may run the same command again after this exit code.
EXIT_INTERRUPTED = 75
# The user stopped the run: a scheduler must not restart it.
EXIT_STOPPED = 76
EXIT_FAILED = 1
_EXIT_CTRL_C = 130


class Status:
    """Context manager. `state` is `running`, `stopped` (the same command resumes the run), `finished` or `failed`.

    Written by rank 0, or by rank 1 where rank 0 is lost.
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
        """Records a failure. `lost`: another rank or its host failed, and the same command resumes the run."""
        if self._rank == (1 if message.startswith("rank 0 ") else 0) and not (
            self._rank and self._written_by_rank_zero()
        ):
            # If the disk is the cause of the failure, the original error is reported, not the one raised here.
            with contextlib.suppress(OSError):
                self._write("failed", exit_code, message, lost=lost)

    def _written_by_rank_zero(self) -> bool:
        """True where rank 0 has written a final state, which takes precedence if both ranks miss each other."""
        return self._file.is_file() and read_json(self._file)["state"] != "running"

    def _write(self, state: str, exit_code: int | None, message: str, *, lost: bool = False) -> None:
        content = {
            "state": state, "step": self.step, "total_steps": self._total_steps, "exit_code": exit_code,
            "message": message, "lost": lost, "pid": os.getpid(), "time": time.time(),
        }  # fmt: skip
        atomic_write_text(self._file, json.dumps(content, indent=2))
