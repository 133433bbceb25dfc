"""Reads W&B's offline file: records in LevelDB's log format (a header of 7 bytes, then blocks of 32 KiB of chunks with
checksums) of W&B's protobuf messages."""

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

    data, offset, message = file.read_bytes(), _HEADER, b""
    assert data[:4] == b":W&B"
    while offset + _HEADER <= len(data):
        if _BLOCK - offset % _BLOCK < _HEADER:
            offset += _BLOCK - offset % _BLOCK
            continue
        checksum, length, kind = struct.unpack_from("<IHB", data, offset)
        chunk = data[offset + _HEADER : offset + _HEADER + length]
        if len(chunk) < length:  # not written yet
            return
        if zlib.crc32(bytes([kind]) + chunk) != checksum:
            raise ValueError(f"{file}: a wrong checksum at byte {offset}")
        offset += _HEADER + length
        message = chunk if kind in (1, 2) else message + chunk
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(message)
            yield record


def finished(file: Path, seconds: float = 20) -> Path:
    """The file, once W&B's own process has written its last record: `finish` does not wait for it."""
    deadline = time.monotonic() + seconds
    while not any(record.WhichOneof("record_type") == "exit" for record in records(file)):
        assert time.monotonic() < deadline, f"{file}: has no end"
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
