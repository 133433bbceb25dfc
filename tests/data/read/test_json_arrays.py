"""JSON arrays are read row by row with bounded memory, and their parts hold every row once."""

import io
import json
import random
import tracemalloc
from pathlib import Path

import pytest

from fireflyds.data.read import json_arrays
from fireflyds.data.read.files import read_records
from fireflyds.data.read.records import FilePart, RawRecord, RejectedRow


def rows_of(count: int, seed: int = 0) -> list[dict[str, object]]:
    generator = random.Random(seed)
    texts = ["字" * 9, 'a "quoted" [text], {so}', "\\ \n\t", "😀", "plain"]
    return [
        {"text": generator.choice(texts) * generator.randint(1, 9), "n": [number, {"x": None}]}
        for number in range(count)
    ]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("chunk", [7, 64, 1000, 1 << 20])
def test_rows_equal_those_of_the_whole_file(
    indent: int | None, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(json_arrays, "CHUNK_BYTES", chunk)
    rows, file = rows_of(60), tmp_path / "a.json"
    for mark in ("", "\ufeff"):
        file.write_text(mark + json.dumps(rows, ensure_ascii=False, indent=indent) + "\n", encoding="utf-8")
        assert [item.fields for item in read_records(file) if isinstance(item, RawRecord)] == rows
        parts = json_arrays.array_parts(str(file))
        assert [start for start, _, _ in parts[1:]] == [end for _, end, _ in parts[:-1]]
        assert (parts[0][0], parts[-1][1]) == (0, file.stat().st_size)
        assert len(parts) > 1 or chunk > 1000
        items = [item for start, end, row in parts for item in read_records(FilePart(str(file), start, end, row))]
        assert [item.fields for item in items if isinstance(item, RawRecord)] == rows
        assert [item.line for item in items] == list(range(1, 61))


@pytest.mark.parametrize(
    ("text", "kept", "reason"),
    [
        ('[{"text": "a"}, {"text": "b"}, {"te', 2, "cannot be read to its end: not JSON in row 3"),
        ('[{"text": "a"}, {"text": "b"}', 2, "not JSON behind row 2: , expected, got the end"),
        ('[{"text": "a"}, {"text": yes}, {"text": "c"}]', 1, "not JSON in row 2"),
        ('[{"text": "a"}] x', 1, "'x' follows the end of the array"),
        ('[{"text": "a"} {"text": "b"}]', 1, "not JSON behind row 1: , expected, got {"),
        ("[]", 0, ""),
    ],
)
def test_a_broken_array_is_told_and_counts_as_a_whole(text: str, kept: int, reason: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    items = list(read_records(file))
    assert sum(isinstance(item, RawRecord) for item in items) == kept
    rejected = [item for item in items if isinstance(item, RejectedRow)]
    assert [item.line for item in rejected] == [0] * bool(reason)
    assert all(reason in item.reason for item in rejected)
    if reason:
        assert json_arrays.array_parts(str(file)) == [(0, file.stat().st_size, 1)]


def test_lines_named_json_are_read_as_lines(tmp_path: Path) -> None:
    rows, file = rows_of(9), tmp_path / "a.json"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [item.fields for item in read_records(file) if isinstance(item, RawRecord)] == rows


def test_the_memory_is_that_of_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_arrays, "CHUNK_BYTES", 1 << 16)
    data = json.dumps(rows_of(40_000), ensure_ascii=False).encode()
    assert len(data) > 3_000_000
    tracemalloc.start()
    assert sum(1 for _ in json_arrays.ArrayRows(io.BytesIO(data))) == 40_000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
