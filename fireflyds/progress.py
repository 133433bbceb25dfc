"""Progress of long work: a bar with rate and time left on a terminal, a line now and then in a log."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

_LOG_SECONDS = 30.0


class Progress:
    """Counts bytes and rows of a piece of work. `total_bytes` is 0 where it is unknown (compressed files, streams)."""

    def __init__(self, title: str, total_bytes: int = 0) -> None:
        self._title, self._total = title, total_bytes
        self._bytes = self._rows = 0
        self._started = self._logged = time.monotonic()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> "Progress":
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
            from rich.progress import Progress as Bar

            columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[state]}"))
            self._bar = Bar(*columns, TimeRemainingColumn(), console=Console(stderr=True), transient=True)
            self._task = self._bar.add_task(self._title, total=self._total or None, state="")
            self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self, num_bytes: int, rows: int = 0) -> None:
        """Counts what was done since the last call."""
        self._bytes += num_bytes
        self._rows += rows
        if self._bar is not None:
            self._bar.update(self._task, completed=self._bytes, state=self._state())
        elif time.monotonic() - self._logged > _LOG_SECONDS:
            self._logged = time.monotonic()
            print(f"{self._title}: {self._state()}{self._remaining()}", file=sys.stderr, flush=True)

    def _state(self) -> str:
        rate = self._bytes / max(time.monotonic() - self._started, 1e-9)
        total = f" of {self._total / 1e6:,.0f}" if self._total else ""
        rows = f", {self._rows:,} rows" if self._rows else ""
        return f"{self._bytes / 1e6:,.0f}{total} MB{rows}, {rate / 1e6:.1f} MB/s"

    def _remaining(self) -> str:
        if not 0 < self._bytes < self._total:
            return ""
        seconds = (self._total - self._bytes) * (time.monotonic() - self._started) / self._bytes
        return f", {seconds / 60:.0f} min left" if seconds >= 60 else f", {seconds:.0f} s left"


def counted(title: str, texts: Iterable[str], total_bytes: int = 0) -> Iterator[str]:
    """Yields the texts and shows how far they are read."""
    with Progress(title, total_bytes) as progress:
        size = rows = 0
        for text in texts:
            yield text
            size += len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))
            rows += 1
            if size > 1 << 20:
                progress.advance(size, rows)
                size = rows = 0
