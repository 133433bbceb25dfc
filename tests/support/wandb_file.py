"""Reads W&B's offline file back: records in LevelDB's log format (blocks of 32 KiB behind a header of 7 bytes, each
piece with its checksum), of the messages that W&B itself declares."""

import struct
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

_BLOCK, _HEADER = 1 << 15, 7


def records(file: Path) -> Iterator:
    """Every `Record`.

    Raises:
        ValueError: a checksum is wrong.
    """
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), _HEADER, b""
    assert data[:4] == b":W&B"
    while at + _HEADER <= len(data):
        if _BLOCK - at % _BLOCK < _HEADER:
            at += _BLOCK - at % _BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + _HEADER : at + _HEADER + length]
        if len(piece) < length:  # not written yet
            return
        if zlib.crc32(bytes([kind]) + piece) != checksum:
            raise ValueError(f"{file}: a wrong checksum at byte {at}")
        at += _HEADER + length
        whole = piece if kind in (1, 2) else whole + piece
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def finished(file: Path, seconds: float = 20) -> Path:
    """The file, once W&B's own process has written its last record: `finish` does not wait for it."""
    until = time.monotonic() + seconds
    while not any(record.WhichOneof("record_type") == "exit" for record in records(file)):
        assert time.monotonic() < until, f"{file}: has no end"
        time.sleep(0.05)
    return file


def history(file: Path) -> list[dict]:
    """The rows that were logged; nested keys joined by dots."""
    import json

    return [
        {".".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records(file)
        if record.WhichOneof("record_type") == "history"
    ]
