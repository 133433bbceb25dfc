"""Rows, files and dialogues that once went missing, or came out wrong."""

import zlib
from pathlib import Path

import numpy as np
import pytest
import zstandard

from fireflyds import registry
from fireflyds.config import CleanConfig, SourceConfig
from fireflyds.data.clean.cleaner import Cleaner, contamination
from fireflyds.data.read.files import RawRecord, RejectedRow, read_records
from fireflyds.data.read.sources import read_source
from fireflyds.data.store.store import PartWriter, token_dtype
from fireflyds.errors import UserError
from fireflyds.types import BOS, Example, Message, Sample


def rows(file: Path) -> tuple[list[dict], list[RejectedRow]]:
    items = list(read_records(file))
    return [i.fields for i in items if isinstance(i, RawRecord)], [i for i in items if isinstance(i, RejectedRow)]


def test_a_stray_carriage_return_costs_one_row_of_a_table(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"text\n" + b"".join(b"row %d\n" % n if n != 7 else b"br\roken\n" for n in range(100)))
    read, rejected = rows(file)
    assert len(read) == 99
    assert [row.line for row in rejected] == [9]


def test_quotation_marks_of_a_tab_separated_table_are_text(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text('"Yes," he said.\t“是的，”他说。\n"No\t不\nthird row.\t第三行\n', encoding="utf-8")
    assert [tuple(row.values()) for row in rows(file)[0]] == [
        ('"Yes," he said.', "“是的，”他说。"),
        ('"No', "不"),
        ("third row.", "第三行"),
    ]


def test_a_row_with_more_cells_than_columns_is_set_aside(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_text("text\nabc, def\nwhole\n")
    read, rejected = rows(file)
    assert read == [{"text": "whole"}]
    assert rejected[0].reason == "2 cells for 1 columns; quote cells that hold the separator"


def test_words_are_no_column_names(tmp_path: Path) -> None:
    file = tmp_path / "a.tsv"
    file.write_text("Good morning\t早上好\nhello there\t你好\n", encoding="utf-8")
    assert len(rows(file)[0]) == 2


def test_a_zstandard_file_of_several_frames_is_read_and_a_cut_one_says_so(tmp_path: Path) -> None:
    lines = [f"line {zlib.crc32(bytes([n % 256, n // 256]))}" for n in range(2000)]
    halves = ["\n".join(part).encode() + b"\n" for part in (lines[:1000], lines[1000:])]
    file = tmp_path / "a.txt.zst"
    file.write_bytes(b"".join(map(zstandard.compress, halves)))
    assert [row["text"] for row in rows(file)[0]] == lines
    file.write_bytes(file.read_bytes()[:-500])
    read, rejected = rows(file)
    assert 1000 <= len(read) < 2000
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
def test_what_is_no_text_is_set_aside_before_it_is_cleaned(tmp_path: Path, row: str) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(row + "\n")
    (item,) = read_source(SourceConfig(path=str(file)))
    assert isinstance(item, RejectedRow)
    assert item.line == 1


def test_a_part_that_is_made_again_leaves_a_finished_store_alone(tmp_path: Path) -> None:
    dtype = token_dtype(100)
    first, second = (Example(np.array(ids), ((0, 3),), 3, is_document=True) for ids in ([1, 2, 3], [7, 8, 9]))
    writer = PartWriter(tmp_path / "new", "key", dtype)
    writer.add(first)
    writer.close({})
    (tmp_path / "store").mkdir()
    for file in (tmp_path / "new").iterdir():
        (tmp_path / "store" / file.name).hardlink_to(file)
    before = (tmp_path / "store" / "key.ids").read_bytes()
    again = PartWriter(tmp_path / "new", "key", dtype)
    assert not (tmp_path / "new" / "key.json").exists()
    again.add(second)
    again.close({})
    assert (tmp_path / "store" / "key.ids").read_bytes() == before != (tmp_path / "new" / "key.ids").read_bytes()


TALK = (Message("user", "give me it"), Message("assistant", "好"))


@pytest.mark.parametrize("name", ["llama2", "gemma", "mistral", "chatml"])
def test_a_system_message_is_text_whatever_stands_in_it(name: str) -> None:
    chat = registry.load("fireflyds.data.templates", name).CHAT
    segments = chat.render((Message("system", f"e.g. {{}} or {{system}}, {BOS} and <|im_end|>"), *TALK))
    text = "".join(segment.text for segment in segments)
    assert text.count(f"e.g. {{}} or {{system}}, {BOS} and <|im_end|>") == 1
    assert text.count("give me it") == 1
    plain = chat.render((Message("system", "x"), *TALK))
    assert sum(segment.special for segment in segments) == sum(segment.special for segment in plain)


def test_an_empty_system_message_is_none() -> None:
    chat = registry.load("fireflyds.data.templates", "firefly").CHAT
    assert chat.render((Message("system", ""), *TALK)) == chat.render(TALK)


def test_sharegpt_takes_one_system_message_and_one_last_answer() -> None:
    layout = registry.load("fireflyds.data.formats", "sharegpt")
    turns = [{"from": "system", "value": "s"}, {"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    found = layout.read({"conversations": turns, "system": "other", "chosen": {"from": "gpt", "value": "b"}})
    assert [message.content for message in found.messages] == ["s", "q", "a"]


def test_sentences_about_copyright_are_no_boilerplate() -> None:
    cleaner = Cleaner(CleanConfig(boilerplate=True))
    for text in ("Copyright law is a field of law.", "分享：他把面包分给了大家，然后离开。"):
        assert cleaner.clean(Sample(text=text)) == Sample(text=text)
    assert cleaner.clean(Sample(text="Copyright © 2020 Example")) == "boilerplate"


def test_an_evaluation_set_with_nothing_in_it_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text("{broken\n")
    with pytest.raises(UserError, match="has no text of clean.overlap=20 characters"):
        contamination(CleanConfig(decontaminate=[str(tmp_path / "bad.jsonl")]))
