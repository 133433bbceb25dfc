"""Opens files as byte streams, decompressed while they are read."""

import contextlib
import gzip
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

PACKED = (".gz", ".zst")


def kind(file: Path) -> str:
    """Returns the suffix that determines the file format: `.jsonl` for `a.jsonl.gz`."""
    suffix = file.suffix.lower()
    return Path(file.stem).suffix.lower() if suffix in PACKED else suffix


@contextlib.contextmanager
def open_bytes(file: str) -> Iterator[IO[bytes]]:
    """Opens a plain, gzip or Zstandard file for reading."""
    if file.lower().endswith(".gz"):
        with gzip.open(file) as stream:
            yield stream  # type: ignore[misc]
    elif file.lower().endswith(".zst"):
        with Path(file).open("rb") as raw:
            yield io.BufferedReader(_Zstandard(raw), 1 << 20)
    else:
        with Path(file).open("rb") as stream:
            yield stream


class _Zstandard(io.RawIOBase):
    """A Zstandard stream that raises `EOFError` if its last frame is truncated; the library's own reader does not."""

    def __init__(self, raw: IO[bytes]) -> None:
        self._raw, self._ready = raw, b""
        self._frame: Any = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        import zstandard

        while not self._ready:
            data = self._raw.read(1 << 18)
            if not data:
                if self._frame is not None:
                    raise EOFError("the compressed file ends before its last frame does")
                return 0
            while data:
                self._frame = self._frame or zstandard.ZstdDecompressor().decompressobj()
                self._ready += self._frame.decompress(data)
                data = self._frame.unused_data if self._frame.eof else b""
                self._frame = None if self._frame.eof else self._frame
        count = min(len(buffer), len(self._ready))
        buffer[:count], self._ready = self._ready[:count], self._ready[count:]
        return count
