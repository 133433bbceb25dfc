"""JSON Lines files with one row per step, truncated on resume."""

import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fireflyds.errors import UserError
from fireflyds.fs import atomic_write_text
from fireflyds.runs import layout
from fireflyds.types import StepMetrics


class JsonlFile:
    """A JSON Lines file whose rows have a `step`. On resume, rows after the checkpoint's step are removed."""

    def __init__(self, path: Path, resumed_at: int) -> None:
        self.kept = [row for row in read_jsonl(path) if row["step"] <= resumed_at]
        """Existing rows up to the step `resumed_at`."""
        atomic_write_text(path, "".join(_json(row) for row in self.kept))
        self._stream = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends a row and flushes it to the operating system.

        Raises:
            UserError: the file cannot be written.
        """
        try:
            self._stream.write(_json(row))
            self._stream.flush()
        except OSError as error:
            raise UserError(
                f"cannot be written ({error.strerror})",
                key=self._stream.name,
                remedy="Make room, and run the same command again",
            ) from error

    def sync(self) -> None:
        """Flushes the file to disk."""
        os.fsync(self._stream.fileno())

    def close(self) -> None:
        """Closes the file."""
        self._stream.close()


class MetricsFile(JsonlFile):
    """`metrics.jsonl`: one row per optimizer step. NaN and infinity are written as null."""

    def __init__(self, run_dir: Path, resumed_at: int) -> None:
        super().__init__(run_dir / layout.METRICS, resumed_at)

    def record(self, metrics: StepMetrics) -> dict[str, Any]:
        """Writes the metrics of a step; returns the row as written, without NaN."""
        row = without_nan(metrics.as_dict())
        self.write(row)
        return row


def without_nan(row: Mapping[str, Any]) -> dict[str, Any]:
    """Replaces NaN and infinity by None, since JSON cannot represent them."""
    return {key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in row.items()}


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Yields the rows of a JSON Lines file; skips a last line without newline, which a killed process may leave."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as stream:
        for line in stream:
            if line.endswith("\n"):
                yield json.loads(line)
