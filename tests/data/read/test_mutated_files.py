"""Files with flipped bytes, cut ends and exchanged fields give samples and rejected rows, and never a traceback."""

import json
import random
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from fireflyds import registry
from fireflyds.config import SourceConfig
from fireflyds.data.read.records import RejectedRow
from fireflyds.data.read.sources import FORMATS, LocatedSample, read_part, source_parts

RECORDS = [registry.load(FORMATS, name).EXAMPLE for name in registry.names(FORMATS)]


def exchanged(generator: random.Random) -> list[dict]:
    """The examples of all formats, with keys and values exchanged between some of them."""
    records = [json.loads(json.dumps(record)) for record in RECORDS]
    for _ in range(generator.randrange(4)):
        first, second = generator.choice(records), generator.choice(records)
        key, other = generator.choice(list(first)), generator.choice(list(second))
        match generator.randrange(4):
            case 0:
                first[key], second[other] = second[other], first[key]
            case 1:
                first[other] = second[other]
            case 2:
                first[key] = generator.choice(
                    [None, 1, "", [], {}, [[]], [None], [{"role": 3}], True, "[1", float("nan")]
                )
            case _:
                first[generator.choice(["tools", "weight", "label", "id", "问题", "history", ""])] = second[other]
    return records


def write(file: Path, records: list[dict], generator: random.Random) -> int:
    """Writes the records, in the format that the suffix names. Returns their number."""
    match file.suffix:
        case ".jsonl":
            file.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in records), encoding="utf-8")
        case ".json":
            file.write_text(json.dumps(records, ensure_ascii=False), encoding="utf-8")
        case ".txt":
            file.write_text("".join(f"{json.dumps(row)}\n" for row in records), encoding="utf-8")
        case ".csv":
            keys = sorted({key for row in records for key in row})
            cells = [",".join('"' + str(row.get(key, "")).replace('"', '""') + '"' for key in keys) for row in records]
            file.write_text("\n".join([",".join(keys), *cells]) + "\n", encoding="utf-8")
            return sum(any(str(value) for value in row.values()) for row in records)  # empty lines are no rows
        case ".parquet":
            rows = [{"row": generator.randrange(9), "text": json.dumps(row)} for row in records]
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return len(records)


def damaged(content: bytes, generator: random.Random) -> bytes:
    """Bytes flipped, a range removed or repeated, or the end cut off."""
    changed = bytearray(content)
    for _ in range(generator.randrange(1, 4)):
        start = generator.randrange(len(changed) + 1)
        end = min(len(changed), start + generator.randrange(1, 60))
        match generator.randrange(5):
            case 0:
                changed = changed[:start]
            case 1:
                del changed[start:end]
            case 2:
                changed[start:start] = changed[start:end]
            case 3:
                changed[start:end] = generator.randbytes(end - start)
            case _:
                changed[start:start] = generator.choice([b'"', b"\n", b"\0", b"\xff\xfe", b"[", b"}", b",", b"\r"])
    return bytes(changed)


def read(file: Path) -> list[LocatedSample | RejectedRow]:
    source = SourceConfig(
        path=str(file), encoding=random.Random(file.name).choice(["utf-8", "utf-8", "gb18030", "utf-16"])
    )
    return [item for part in source_parts(source) for item in read_part(source, part)]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".csv", ".parquet"])
def test_every_row_of_exchanged_fields_is_read_or_rejected(tmp_path: Path, suffix: str) -> None:
    generator = random.Random(suffix)
    for number in range(60):
        file = tmp_path / f"{number}{suffix}"
        num_rows = write(file, exchanged(generator), generator)
        items = [
            item
            for part in source_parts(SourceConfig(path=str(file)))
            for item in read_part(SourceConfig(path=str(file)), part)
        ]
        assert len(items) == num_rows
        assert all(isinstance(item, LocatedSample | RejectedRow) for item in items)


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".txt", ".csv", ".parquet"])
def test_damaged_files_give_samples_and_rejected_rows(tmp_path: Path, suffix: str) -> None:
    generator = random.Random(suffix)
    for number in range(60):
        file = tmp_path / f"{number}{suffix}"
        write(file, exchanged(generator), generator)
        file.write_bytes(damaged(file.read_bytes(), generator))
        for item in read(file):
            if isinstance(item, RejectedRow):
                assert item.reason
                assert item.line >= 0
            else:
                texts = [item.sample.text] if item.sample.text else [m.content for m in item.sample.messages]
                assert all(isinstance(text, str) and text.encode() for text in texts if text)
