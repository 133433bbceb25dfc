"""Regressions: rows, files and dialogues that were lost or read incorrectly."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard

from fireflyds import registry
from fireflyds.config import CleanConfig, SourceConfig
from fireflyds.data.clean.cleaner import Cleaner, contamination
from fireflyds.data.read.files import read_records
from fireflyds.data.read.records import RawRecord, RejectedRow
from fireflyds.data.read.sources import read_source
from fireflyds.data.store.store import PartWriter, token_dtype
from fireflyds.errors import UserError
from fireflyds.types import BOS, Example, Message, Sample


def rows(file: Path) -> tuple[list[dict], list[RejectedRow]]:
    items = list(read_records(file))
    return [item.fields for item in items if isinstance(item, RawRecord)], [
        item for item in items if isinstance(item, RejectedRow)
    ]


def test_a_stray_carriage_return_rejects_one_row_of_a_table(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"text\n" + b"".join(b"row %d\n" % n if n != 7 else b"br\roken\n" for n in range(100)))
    records, rejected = rows(file)
    assert len(records) == 99
    assert [row.line for row in rejected] == [9]


def test_quotation_marks_of_a_tab_separated_table_are_text(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text('"Yes," he said.\t“是的，”他说。\n"No\t不\nthird row.\t第三行\n', encoding="utf-8")
    assert [tuple(row.values()) for row in rows(file)[0]] == [
        ('"Yes," he said.', "“是的，”他说。"),
        ('"No', "不"),
        ("third row.", "第三行"),
    ]


def test_a_row_with_more_cells_than_columns_is_rejected(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text\nabc, def\nwhole\n")
    records, rejected = rows(file)
    assert records == [{"text": "whole"}]
    assert rejected[0].reason == "2 cells for 1 columns; quote cells that hold the separator"


def test_a_first_row_of_text_is_not_a_header(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("Good morning\t早上好\nhello there\t你好\n", encoding="utf-8")
    assert len(rows(file)[0]) == 2


def test_a_zstandard_file_of_several_frames_is_read_and_a_truncated_one_is_reported(tmp_path: Path) -> None:
    lines = [f"line {zlib.crc32(bytes([n % 256, n // 256]))}" for n in range(2000)]
    frames = ["\n".join(part).encode() + b"\n" for part in (lines[:1000], lines[1000:])]
    file = tmp_path / "a.txt.zst"
    file.write_bytes(b"".join(map(zstandard.compress, frames)))
    assert [row["text"] for row in rows(file)[0]] == lines
    file.write_bytes(file.read_bytes()[:-500])
    records, rejected = rows(file)
    assert 1000 <= len(records) < 2000
    assert rejected[-1].line == 0
    assert "ends before its last frame does" in rejected[-1].reason


@pytest.mark.parametrize(
    "row",
    [
        '{"instruction": "1+1?", "output": 2}',
        '{"messages": [{"role": "user", "content": [{"type": "text"}]}, {"role": "assistant", "content": "a"}]}',
        '{"text": "half \\ud800 pair"}',
    ],
)
def test_rows_without_valid_text_are_rejected_before_cleaning(tmp_path: Path, row: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(row + "\n")
    (item,) = read_source(SourceConfig(path=str(file)))
    assert isinstance(item, RejectedRow)
    assert item.line == 1


def test_rewriting_a_part_does_not_change_a_finished_store(tmp_path: Path) -> None:
    dtype = token_dtype(100)
    first, second = (Example(np.array(ids), ((0, 3),), 3, is_document=True) for ids in ([1, 2, 3], [7, 8, 9]))
    writer = PartWriter(tmp_path / "new", "key", dtype)
    writer.add(first)
    writer.close({})
    (tmp_path / "store").mkdir()
    for file in (tmp_path / "new").iterdir():
        (tmp_path / "store" / file.name).hardlink_to(file)
    ids_before = (tmp_path / "store" / "key.ids").read_bytes()
    second_writer = PartWriter(tmp_path / "new", "key", dtype)
    assert not (tmp_path / "new" / "key.json").exists()
    second_writer.add(second)
    second_writer.close({})
    assert (tmp_path / "store" / "key.ids").read_bytes() == ids_before != (tmp_path / "new" / "key.ids").read_bytes()


DIALOGUE = (Message("user", "give me it"), Message("assistant", "好"))


def render(chat, *messages: Message):
    return chat.render(Sample(messages=messages))


@pytest.mark.parametrize("name", ["llama2", "gemma", "mistral", "chatml"])
def test_a_system_message_is_plain_text_whatever_it_contains(name: str) -> None:
    chat = registry.load("fireflyds.data.templates", name).CHAT
    segments = render(chat, Message("system", f"e.g. {{}} or {{system}}, {BOS} and <|im_end|>"), *DIALOGUE)
    text = "".join(segment.text for segment in segments)
    assert text.count(f"e.g. {{}} or {{system}}, {BOS} and <|im_end|>") == 1
    assert text.count("give me it") == 1
    reference_segments = render(chat, Message("system", "x"), *DIALOGUE)
    assert sum(segment.special for segment in segments) == sum(segment.special for segment in reference_segments)


def test_an_empty_system_message_is_omitted() -> None:
    chat = registry.load("fireflyds.data.templates", "firefly").CHAT
    assert render(chat, Message("system", ""), *DIALOGUE) == render(chat, *DIALOGUE)


def test_sharegpt_takes_one_system_message() -> None:
    data_format = registry.load("fireflyds.data.formats", "sharegpt")
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    sample = data_format.read({"conversations": turns, "system": "s"})
    assert [message.content for message in sample.messages] == ["s", "q", "a"]
    with pytest.raises(ValueError, match="in the record and in turn 1, with different texts"):
        data_format.read({"conversations": turns, "system": "other"})


def test_sentences_about_copyright_are_not_boilerplate() -> None:
    cleaner = Cleaner(CleanConfig(boilerplate=True))
    for text in ("Copyright law is a field of law.", "分享：他把面包分给了大家，然后离开。"):
        assert cleaner.clean(Sample(text=text)) == Sample(text=text)
    assert cleaner.clean(Sample(text="Copyright © 2020 Example")) == "boilerplate"


def test_an_evaluation_set_without_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "short"}\n')
    with pytest.raises(UserError, match="has no text of clean.overlap=20 characters"):
        contamination(CleanConfig(decontaminate=[str(tmp_path / "bad.jsonl")]))


def test_an_evaluation_set_that_cannot_be_read_whole_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"text": "a sentence of more than twenty letters"}\n{broken\n')
    with pytest.raises(UserError, match=r"bad.jsonl: line 2 cannot be read \(not JSON"):
        contamination(CleanConfig(decontaminate=[str(tmp_path / "bad.jsonl")]))
