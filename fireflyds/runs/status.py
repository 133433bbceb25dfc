"""The status of a run in `status.json`, for monitoring: launchers do not reliably pass on exit codes."""

import contextlib
import json
import os
import time
from pathlib import Path

from fireflyds.errors import LostRankError, UserError
from fireflyds.fs import atomic_write_text, read_json
from fireflyds.runs.layout import EXIT_CTRL_C, EXIT_FAILED, FAILED, RUNNING, STATUS, STOPPED


class Status:
    """Context manager. `state` is `running`, `stopped` (the same command resumes the run), `finished` or `failed`.

    Written by rank 0, or by rank 1 where rank 0 is lost.
    """

    def __init__(self, run_dir: Path, rank: int, total_steps: int) -> None:
        self._file, self._rank, self._total_steps = run_dir / STATUS, rank, total_steps
        self.step = 0

    def __enter__(self) -> "Status":
        self.write(RUNNING)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if kind is None or issubclass(kind, SystemExit):
            return
        if isinstance(error, KeyboardInterrupt):
            self.write(STOPPED, EXIT_CTRL_C, "interrupted outside of training steps")
        elif error is not None:
            self.failed(error)

    def write(self, state: str, exit_code: int | None = None, message: str = "") -> None:
        """Writes the status on rank 0; has no effect on other ranks."""
        if self._rank == 0:
            self._write(state, exit_code, message)

    def failed(self, error: BaseException) -> None:
        """Records a failure: its message, exit code and `kind` (`user_error`, `lost_rank`, `diverged` or `error`)."""
        writer = 1 if isinstance(error, LostRankError) and error.rank == 0 else 0
        if self._rank != writer or (self._rank and self._written_by_rank_zero()):
            return
        code, kind = (error.exit_code, error.kind) if isinstance(error, UserError) else (EXIT_FAILED, "error")
        # If the disk is the cause of the failure, the original error is reported, not the one raised here.
        with contextlib.suppress(OSError):
            self._write(FAILED, code, str(error) or type(error).__name__, kind)

    def _written_by_rank_zero(self) -> bool:
        """True where rank 0 has written a final state, which takes precedence if both ranks miss each other."""
        return self._file.is_file() and read_json(self._file)["state"] != RUNNING

    def _write(self, state: str, exit_code: int | None, message: str, kind: str = "") -> None:
        content = {
            "state": state,
            "step": self.step,
            "total_steps": self._total_steps,
            "exit_code": exit_code,
            "message": message,
            "kind": kind,
            "pid": os.getpid(),
            "time": time.time(),
        }
        atomic_write_text(self._file, json.dumps(content, indent=2))
