"""Raw files: the rows that are read, and those that are rejected with their reason."""

import csv
import gzip
import json
from itertools import pairwise
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from fireflyds.config import SourceConfig, TextSplit
from fireflyds.data.read.files import describe_folder, find_files, read_records
from fireflyds.data.read.records import FilePart, RawRecord, RejectedRow
from fireflyds.data.read.sources import read_source, read_texts
from fireflyds.errors import UserError
from fireflyds.types import Sample

ROWS = [{"text": "白日依山尽"}, {"text": "黄河入海流"}]


def write(folder: Path, name: str) -> Path:
    file = folder / name
    match file.suffix:
        case ".txt":
            file.write_text("白日依山尽\n\n黄河入海流\n", encoding="utf-8")
        case ".jsonl":
            file.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
        case ".json":
            file.write_text(json.dumps(ROWS), encoding="utf-8")
        case ".csv" | ".tsv":
            with file.open("w", encoding="utf-8", newline="") as stream:
                writer = csv.DictWriter(stream, ["text"], delimiter="\t" if file.suffix == ".tsv" else ",")
                writer.writeheader()
                writer.writerows(ROWS)
        case ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), file)
        case ".arrow":
            table = pyarrow.Table.from_pylist(ROWS)
            open_file = pyarrow.ipc.new_stream if name.startswith("s") else pyarrow.ipc.new_file
            with open_file(str(file), table.schema) as writer:
                writer.write_table(table)
        case ".gz":
            file.write_bytes(gzip.compress(write(folder, file.stem).read_bytes()))
            (folder / file.stem).unlink()
        case ".zst":
            file.write_bytes(zstandard.compress(write(folder, file.stem).read_bytes()))
            (folder / file.stem).unlink()
    return file


@pytest.mark.parametrize(
    "name",
    [
        "a.txt",
        "a.jsonl",
        "a.json",
        "a.csv",
        "a.tsv",
        "a.parquet",
        "a.arrow",
        "s.arrow",
        "a.txt.gz",
        "a.jsonl.zst",
        "a.parquet.gz",
    ],
)
def test_every_kind_of_file_gives_the_same_documents(tmp_path: Path, name: str) -> None:
    write(tmp_path, name)
    expected = ["白日依山尽", "黄河入海流"]
    assert list(read_texts(str(tmp_path / name))) == expected
    assert list(read_texts(str(tmp_path))) == expected
    assert list(read_texts(str(tmp_path / "*.*"))) == expected


def test_text_is_split_by_line_paragraph_or_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_text("一\n二\n\n三\n", encoding="utf-8")
    texts = {
        text_split: [row.fields["text"] for row in read_records(file, text_split) if isinstance(row, RawRecord)]
        for text_split in TextSplit
    }
    assert texts == {
        TextSplit.line: ["一", "二", "三"],
        TextSplit.paragraph: ["一\n二", "三"],
        TextSplit.file: ["一\n二\n\n三"],
    }


def test_invalid_rows_are_rejected_with_file_line_and_reason(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "ok"}\n{broken\n{"text": "\xff"}\n[1]\n{"other": 1}\n{"text": " "}\n"bare"\n')
    items = list(read_source(SourceConfig(path=str(file))))
    assert [item.text for item in items if isinstance(item, Sample)] == ["ok", "bare"]
    reason_by_line = {item.line: item.reason for item in items if isinstance(item, RejectedRow)}
    assert sorted(reason_by_line) == [2, 3, 4, 5, 6]
    assert "not JSON" in reason_by_line[2]
    assert "not UTF-8: byte 0xff at column 11" in reason_by_line[3]
    assert "got list" in reason_by_line[4]
    assert "no known layout has the fields other" in reason_by_line[5]
    assert "empty" in reason_by_line[6]


def test_a_file_in_another_encoding_is_rejected(tmp_path: Path) -> None:
    for name, content in (
        ("a.txt", "中文\n".encode("gb18030")),
        ("b.json", b'{"text": "\xd6\xd0"}'),
        ("c.parquet", b"no"),
    ):
        (tmp_path / name).write_bytes(content)
        items = list(read_records(tmp_path / name))
        assert len(items) == 1
        assert isinstance(items[0], RejectedRow)


def test_missing_empty_and_unknown_files_are_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").touch()
    (tmp_path / "a.doc").write_text("x")
    with pytest.raises(UserError, match="no documents"):
        list(read_texts(str(tmp_path / "empty.txt")))
    with pytest.raises(UserError, match=r"ending '.doc' is not known"):
        find_files(str(tmp_path / "a.doc"))
    with pytest.raises(UserError, match="no such file"):
        find_files(str(tmp_path / "nothing"))


@settings(max_examples=150, deadline=None)
@given(
    st.binary(max_size=300),
    st.sampled_from([".txt", ".jsonl", ".json", ".csv", ".parquet", ".arrow", ".txt.gz", ".jsonl.zst"]),
)
def test_arbitrary_bytes_raise_no_exception(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, suffix: str
) -> None:
    file = tmp_path_factory.mktemp("fuzz") / f"x{suffix}"
    file.write_bytes(content)
    for item in read_source(SourceConfig(path=str(file))):
        assert isinstance(item, Sample | RejectedRow)


def test_parts_of_a_file_give_its_rows_once_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": "字" * (number % 7 + 1)}, ensure_ascii=False) for number in range(50)]
    lines[20] = "{broken"
    file.write_text("\ufeff" + "\n".join(lines), encoding="utf-8")
    expected = [(row.line, isinstance(row, RawRecord)) for row in read_records(file)]
    content = file.read_bytes()
    offsets = [0, content.index(b"\n", 100) + 1, content.index(b"\n", 400) + 1, len(content)]
    parts = [FilePart(str(file), start, end, 1 + content[:start].count(b"\n")) for start, end in pairwise(offsets)]
    assert [(row.line, isinstance(row, RawRecord)) for part in parts for row in read_records(part)] == expected
    assert (21, False) in expected


def test_a_table_without_column_names_begins_with_its_data(tmp_path: Path) -> None:
    (tmp_path / "pairs.tsv").write_text("Good morning, all.\t早上好。\nThank you.\t谢谢。\n", encoding="utf-8")
    texts = [item.text for item in read_source(SourceConfig(path=str(tmp_path))) if isinstance(item, Sample)]
    assert sorted(tuple(sorted(text.split("\n"))) for text in texts) == [
        ("Good morning, all.", "早上好。"),
        ("Thank you.", "谢谢。"),
    ]


def test_a_truncated_compressed_file_keeps_the_rows_before_the_error(tmp_path: Path) -> None:
    file = write(tmp_path, "a.jsonl.gz")
    compressed = gzip.compress(b'{"text": "x"}\n' * 50_000)
    file.write_bytes(compressed[: len(compressed) // 2])
    items = list(read_records(file))
    assert isinstance(items[-1], RejectedRow)
    assert "cannot be read to its end" in items[-1].reason
    assert all(isinstance(item, RawRecord) for item in items[:-1])


def test_an_unclosed_quotation_mark_rejects_its_lines(tmp_path: Path) -> None:
    lines = ["question,answer", "a,b", 'c,"d', *(f"q{number},a{number}" for number in range(50))]
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    items = list(read_records(tmp_path / "a.csv"))
    assert [item.fields for item in items if isinstance(item, RawRecord)] == [{"question": "a", "answer": "b"}]
    rejected = [item for item in items if isinstance(item, RejectedRow)]
    assert [item.line for item in rejected] == list(range(3, 54))
    assert {item.reason for item in rejected} == {"a quotation mark in line 3 opens a cell that is not closed"}


def test_quotation_marks_within_cells_and_over_lines_are_read(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('question,answer\n5" screen,"two\nlines"\n"he said ""hi""",x\n', encoding="utf-8")
    assert [item.fields for item in read_records(tmp_path / "a.csv") if isinstance(item, RawRecord)] == [
        {"question": '5" screen', "answer": "two\nlines"},
        {"question": 'he said "hi"', "answer": "x"},
    ]


@pytest.mark.parametrize("name", ["a.json", "a.parquet", "a.arrow"])
def test_a_file_that_breaks_off_is_rejected_as_a_whole(tmp_path: Path, name: str) -> None:
    file = write(tmp_path, name)
    file.write_bytes(file.read_bytes()[:-7])
    items = list(read_records(file))
    assert isinstance(items[-1], RejectedRow)
    assert (items[-1].line, items[-1].reason[:28]) == (0, "cannot be read to its end: n")


TEXT = "他们说，这个地方的人都在学习中文。\n我们也是。\n"


@pytest.mark.parametrize("encoding", ["gb18030", "gbk", "utf-16", "utf-16-le", "utf-8-sig"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.csv", "a.json"])
def test_a_given_encoding_is_decoded(tmp_path: Path, encoding: str, name: str) -> None:
    lines = TEXT.splitlines()
    content = {
        ".txt": TEXT,
        ".jsonl": "".join(json.dumps({"text": line}, ensure_ascii=False) + "\n" for line in lines),
        ".csv": "text\n" + "".join(f'"{line}"\n' for line in lines),
        ".json": json.dumps([{"text": line} for line in lines], ensure_ascii=False),
    }[Path(name).suffix]
    (tmp_path / name).write_bytes(content.encode(encoding))
    source = SourceConfig(path=str(tmp_path / name), encoding=encoding)
    assert [item.text for item in read_source(source) if isinstance(item, Sample)] == lines


@pytest.mark.parametrize(
    ("encoding", "text", "likely"),
    [
        ("gb18030", TEXT, "gb18030"),
        ("big5", "他們說，這個地方的人都在學習中文。\n", "big5"),
        ("utf-16", TEXT, "utf-16"),
    ],
)
def test_the_likely_encoding_is_named(tmp_path: Path, encoding: str, text: str, likely: str) -> None:
    (tmp_path / "a.txt").write_bytes(text.encode(encoding))
    first = next(iter(read_records(tmp_path / "a.txt")))
    assert isinstance(first, RejectedRow)
    assert f"give data.sources=[{{path: ..., encoding: {likely}}}]" in first.reason


def test_other_bytes_name_no_encoding(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"abc \xff\xfe\x00 def\n")
    (item,) = read_records(tmp_path / "a.txt")
    assert isinstance(item, RejectedRow)
    assert "not UTF-8: byte 0xff at column 5; convert the file to UTF-8" in item.reason
    with pytest.raises(UserError, match="data.sources.encoding=klingon: is not an encoding"):
        SourceConfig(path="x", encoding="klingon")
    with pytest.raises(UserError, match="data.sources.encoding=hex: is not an encoding"):
        SourceConfig(path="x", encoding="hex")


def test_a_folder_is_described_before_it_is_read(tmp_path: Path) -> None:
    for name in (
        "train.jsonl",
        "test.jsonl",
        "latest.jsonl",
        "._train.jsonl",
        ".cache/x.txt",
        "a.jsonl.xz",
        "README.md",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text('{"text": "x"}\n')
    assert [file.name for file in find_files(str(tmp_path))] == ["latest.jsonl", "test.jsonl", "train.jsonl"]
    assert describe_folder(tmp_path) == [
        f"{tmp_path}: not read, as their endings are not known: README.md, a.jsonl.xz",
        f"{tmp_path}: not read: 2 hidden files",
        f"{tmp_path}: read too, though named like a test or validation split: test.jsonl",
    ]


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("a.jsonl.xz", "Unpack the file, or pack it with gzip or zstd"),
        ("a.tar.gz", "Unpack the archive, and give the folder"),
        ("a.zip", "Unpack the archive, and give the folder"),
        ("zh.vocab", "pieces= of launch/expand.py"),
        ("a.docx", "Known: .txt .jsonl"),
    ],
)
def test_files_of_other_endings_are_refused_with_what_to_do(tmp_path: Path, name: str, remedy: str) -> None:
    (tmp_path / name).write_text("x")
    with pytest.raises(UserError, match=r"ending '.*' is not known") as caught:
        find_files(str(tmp_path / name))
    assert remedy in caught.value.remedy


def test_a_row_or_paragraph_with_an_undecodable_line_is_rejected_whole(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b'question,answer\n"one\ntwo \xff\nthree",A\nq,a\n')
    items = list(read_records(tmp_path / "a.csv"))
    assert [item.fields for item in items if isinstance(item, RawRecord)] == [{"question": "q", "answer": "a"}]
    assert sorted(item.line for item in items if isinstance(item, RejectedRow)) == [2, 3, 4]
    (tmp_path / "a.txt").write_bytes(b"one\ntwo \xff\nthree\n\nfour\nfive\n")
    items = list(read_records(tmp_path / "a.txt", TextSplit.paragraph))
    assert [item.fields["text"] for item in items if isinstance(item, RawRecord)] == ["four\nfive"]
    assert [item.line for item in items if isinstance(item, RejectedRow)] == [2, 1]
