"""Reads JSON files as streams of rows with bounded memory: arrays of rows, and JSON Lines with the suffix `.json`."""

import codecs
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from fireflyds.data.read.encodings import UTF8
from fireflyds.data.read.streams import open_bytes

# Bytes read at a time, and the distance of the cuts between parts.
CHUNK_BYTES = 8 << 20
# A row that ends beyond as many characters is no row, but a string or an object that nothing closes.
_MAX_ROW = 1 << 28
_SPACE = re.compile(r"[ \t\n\r]*")
# An error of the parser closer to the end of what was read may be due to that end.
_NEAR_END = 64
_decode = json.JSONDecoder().raw_decode


def holds_array(file: str, encoding: str) -> bool:
    """True where the file begins with `[`: its rows are read one by one."""
    with open_bytes(file) as stream:
        return _incremental(encoding).decode(stream.read(1 << 12)).lstrip()[:1] == "["


def holds_lines(file: str, encoding: str) -> bool:
    """True where the first line of the file is one JSON object and another follows (JSON Lines named `.json`)."""
    with open_bytes(file) as stream:
        text = _incremental(encoding).decode(stream.read(CHUNK_BYTES)).lstrip()
    first, _, rest = text.partition("\n")
    try:
        return isinstance(json.loads(first), dict) and rest.lstrip()[:1] == "{"
    except ValueError:
        return False


def _incremental(encoding: str) -> codecs.IncrementalDecoder:
    return codecs.getincrementaldecoder("utf-8-sig" if encoding == UTF8 else encoding)()


class ArrayRows:
    """The rows of a JSON array, or of a part of one that begins at a row (`start` > 0) and ends at byte `end`."""

    def __init__(self, stream: IO[bytes], encoding: str = UTF8, start: int = 0, end: int | None = None) -> None:
        self._stream, self._left = stream, None if end is None else end - start
        self._decoder = _incremental(encoding)
        self._inside = start > 0
        if start:
            stream.seek(start)
        self._text, self._position, self._offset = "", 0, start
        self.cuts: list[tuple[int, int]] = []
        """Byte offsets at which a row begins, with the number of rows before it: one every `CHUNK_BYTES`."""
        self._num_rows = 0

    def __iter__(self) -> Iterator[Any]:
        """Yields the rows.

        Raises:
            ValueError: the text is no JSON array; what was yielded before are whole rows.
        """
        if not self._inside:
            self._expect("[")
        elif self._next() == ",":  # a part may begin before the comma between two rows
            self._position += 1
        first = self._next()
        if first == "]":
            self._close()
        if first == "]" or (not first and self._inside):
            return
        while True:
            yield self._row()
            following = self._next()
            if following == "]":
                self._close()
                return
            if not following and self._left is not None:  # the end of a part
                return
            self._expect(",")
            if not self._next() and self._left is not None:
                return

    def _row(self) -> Any:
        self._next()
        while True:
            try:
                row, end = _decode(self._text, self._position)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or error.pos >= len(self._text) - _NEAR_END
                if len(self._text) - self._position > _MAX_ROW or not is_cut or not self._read():
                    raise ValueError(f"not JSON in row {self._num_rows + 1:,}: {error.msg}") from error
                continue
            self._position, self._num_rows = end, self._num_rows + 1
            return row

    def _next(self) -> str:
        """The next character that is no white space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._position)
            self._position = match.end() if match else self._position
            if self._position < len(self._text):
                return self._text[self._position]
            if not self._read():
                return ""

    def _expect(self, character: str) -> None:
        if (found := self._next()) != character:
            raise ValueError(f"not JSON behind row {self._num_rows:,}: {character} expected, got {found or 'the end'}")
        self._position += 1

    def _close(self) -> None:
        self._position += 1
        if following := self._next():
            raise ValueError(f"not JSON: {following!r} follows the end of the array")

    def _read(self) -> bool:
        """Reads on; False at the end. What was used is dropped, so that the memory is that of a chunk and a row."""
        self._offset += len(self._text[: self._position].encode())
        size = CHUNK_BYTES if self._left is None else min(CHUNK_BYTES, self._left)
        data = self._stream.read(size)
        if data and self._num_rows and (not self.cuts or self.cuts[-1][1] < self._num_rows):
            self.cuts.append((self._offset, self._num_rows))
        if not self._offset and data.startswith(codecs.BOM_UTF8):  # the decoder drops it
            self._offset = len(codecs.BOM_UTF8)
        self._left = None if self._left is None else self._left - len(data)
        self._text, self._position = self._text[self._position :] + self._decoder.decode(data, final=not data), 0
        return bool(data)


def array_parts(file: str) -> list[tuple[int, int, int]]:
    """Returns parts of an array in a UTF-8 file, `(start, end, number of the first row)`, of about `CHUNK_BYTES` each.

    One part where the array is not closed, or a part would begin where no row does: then the file counts as a whole.
    """
    size = Path(file).stat().st_size
    with open_bytes(file) as stream:
        rows = ArrayRows(stream)
        try:
            for _ in rows:
                pass
        except (ValueError, RecursionError):
            return [(0, size, 1)]
    bounds = [(0, 0), *rows.cuts]
    ends = [*(start for start, _ in rows.cuts), size]
    return [(start, end, count + 1) for (start, count), end in zip(bounds, ends, strict=True) if end > start]
