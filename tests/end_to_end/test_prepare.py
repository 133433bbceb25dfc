"""The prepare verb: what is kept between runs, what is made again, and what a person sees."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
from samples import CHINESE, ENGLISH

from fireflyds.data.store import parts
from fireflyds.data.store.store import TokenStore

ROOT = Path(__file__).parents[2]


def write(path: Path, rows: list) -> None:
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def texts(store: TokenStore, encoder) -> list[str]:
    return [
        encoder.decode(store.ids(number, 1, length - 2).tolist())
        for number, length in enumerate(store.lengths.tolist())
    ]


TALKS = [
    {"messages": [{"role": "user", "content": f"问题{n}？"}, {"role": "assistant", "content": "回答。"}]}
    for n in range(5)
]


def test_a_store_holds_every_document_in_order_with_its_domain_and_language(
    verb, tmp_path: Path, base_tokenizer: Path, encoder
) -> None:
    write(tmp_path / "en.txt", ENGLISH)
    write(tmp_path / "zh.jsonl", [{"text": text} for text in CHINESE] + [{"text": CHINESE[0]}])
    write(tmp_path / "talk.jsonl", TALKS)
    sources = (
        "data.sources=[{path: en.txt, domain: en, language: en}, {path: zh.jsonl, domain: zh, language: zh, weight: "
        "3.0, max_documents: 10}, {path: talk.jsonl, domain: chat, language: zh}]"
    )
    done = verb("prepare", sources, f"tokenizer={base_tokenizer}", "out=s", "clean.duplicates=exact", "workers=2")
    store = TokenStore(tmp_path / "s")
    found = texts(store, encoder)
    assert found[: len(ENGLISH)] == ENGLISH
    assert [store.domains[number] for number in store.domain_ids] == ["en"] * len(ENGLISH) + ["zh"] * 10 + ["chat"] * 5
    assert set(found[len(ENGLISH) : len(ENGLISH) + 10]) < set(CHINESE)
    assert store.languages[store.language_ids[-1]] == "zh"
    counts = store.manifest["per_domain"]["zh"]
    assert (counts["read"], counts["documents"]) == (len(CHINESE) + 1, 10)
    assert counts["reasons"] == {"duplicate": 1, "beyond max_documents": len(CHINESE) - 10}
    assert store.manifest["weights"] == {"zh": 3.0}
    assert store.manifest["per_domain"]["chat"]["formats"] == {"messages": 5}
    assert "zh: dropped 1: duplicate" in done.stdout


def test_only_what_a_change_touches_is_made_again(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    write(tmp_path / "en.txt", ENGLISH)
    write(tmp_path / "talk.jsonl", TALKS)
    sources = "data.sources=[{path: en.txt}, {path: talk.jsonl}]"
    same = ["prepare", sources, f"tokenizer={base_tokenizer}", "out=s", "workers=1"]
    verb(*same)
    before = {file.name: file.stat().st_ino for file in (tmp_path / "s" / "parts").glob("*.ids")}
    assert "nothing to do" in verb(*same).stdout
    assert "1 of 2 parts are reused" in verb(*same, "template=vicuna").stdout
    write(tmp_path / "talk.jsonl", TALKS[:3])
    assert "1 of 2 parts are reused" in verb(*same).stdout
    after = {file.name: file.stat().st_ino for file in (tmp_path / "s" / "parts").glob("*.ids")}
    assert len(after) == 2
    assert len(before.items() & after.items()) == 1
    assert TokenStore(tmp_path / "s").manifest["totals"]["dialogues"] == 3
    assert "are reused" not in verb(*same, "clean.simplify=true").stdout


@pytest.mark.chaos
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_prepare_goes_on_where_it_was(tmp_path: Path, base_tokenizer: Path, number: int) -> None:
    lines = "\n".join(ENGLISH) + "\n"
    (tmp_path / "en.txt").write_text(lines * (5 * parts.PART_BYTES // len(lines)), encoding="utf-8")
    command = [
        sys.executable,
        str(ROOT / "launch" / "prepare.py"),
        "data=en.txt",
        f"tokenizer={base_tokenizer}",
        "out=s",
        "workers=1",
    ]
    # Whoever runs the tests in the background ignores SIGINT, and what they start would too.
    heeded = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    running = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, preexec_fn=heeded)
    place = tmp_path / ".s.partial" / "parts"
    for _ in range(1200):
        if place.exists() and list(place.glob("*.json")):
            break
        time.sleep(0.05)
    os.killpg(running.pid, number)
    running.wait()
    assert not (tmp_path / "s").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "parts are reused" in done.stdout
    assert len(TokenStore(tmp_path / "s")) == len(ENGLISH) * (5 * parts.PART_BYTES // len(lines))
    assert not (tmp_path / ".s.partial").exists()


def test_too_many_unreadable_rows_stop_it_and_nothing_looks_finished(
    verb, tmp_path: Path, base_tokenizer: Path
) -> None:
    write(tmp_path / "a.jsonl", [{"text": "fine"}] * 20 + ["{broken"] * 2)
    done = verb("prepare", "data=a.jsonl", f"tokenizer={base_tokenizer}", "out=s", check=False)
    assert done.returncode == 2
    assert "max_rejected=0.01: 2 of 22 rows cannot be used (not JSON (2))" in done.stderr
    assert '"line": 21' in done.stderr
    assert not (tmp_path / "s").exists()
    assert (
        "1 of 1 parts are reused"
        in verb("prepare", "data=a.jsonl", f"tokenizer={base_tokenizer}", "out=s", "max_rejected=0.1").stdout
    )


def test_samples_are_shown_with_what_is_learnt_and_nothing_is_written(
    verb, tmp_path: Path, base_tokenizer: Path
) -> None:
    write(tmp_path / "talk.jsonl", TALKS)
    shown = verb("prepare", "data=talk.jsonl", f"tokenizer={base_tokenizer}", "inspect=2").stdout
    assert shown.count("⟦回答。</s>⟧") == 2
    assert "<s>问题0？</s>" in shown
    assert [path.name for path in tmp_path.iterdir()] == ["talk.jsonl"]


def test_the_table_of_a_store_is_shown_alone(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    write(tmp_path / "en.txt", ENGLISH)
    verb("prepare", "data=en.txt", f"tokenizer={base_tokenizer}", "out=s")
    shown = verb("prepare", "out=s", "stats=only").stdout
    assert f"{len(ENGLISH):,}" in shown
    assert "length in tokens" in shown
    assert (tmp_path / "s" / "stats.png").stat().st_size > 5_000


def test_whatever_stands_in_files_ends_in_the_store_or_among_the_rejected(
    verb, tmp_path: Path, base_tokenizer: Path
) -> None:
    (tmp_path / "nasty").mkdir()
    files = {
        "nul.txt": b"a\x00b\nplain\n",
        "newlines.txt": b"one\r\ntwo\rstill two\n\n\x0c\nthree",
        "bom.jsonl": b'\xef\xbb\xbf{"text": "with a mark"}\n',
        "surrogate.jsonl": b'{"text": "half \\ud800 pair"}\n{"text": "whole"}\n',
        "deep.jsonl": b'{"text": ' + b"[" * 20_000 + b"]" * 20_000 + b"}\n",
        "huge.txt": "字".encode() * 1_000_000,
        "broken.jsonl": b'{"text": "\xff\xfe"}\n{"text": 3}\n{"text": null}\n[]\n{}\n',
        "empty.json": b"",
        "number.json": b"17",
        "binary.parquet": bytes(range(256)),
        "binary.jsonl.gz": bytes(range(256)),
    }
    for name, content in files.items():
        (tmp_path / "nasty" / name).write_bytes(content)
    done = verb("prepare", "data=nasty", f"tokenizer={base_tokenizer}", "out=s", "max_rejected=1", "workers=2")
    assert "Traceback" not in done.stderr
    manifest = TokenStore(tmp_path / "s").manifest
    # 2 + 3 + 1 + 1 + 1 documents.
    assert manifest["totals"]["documents"] == 8
    assert manifest["totals"]["dropped"] == 0
    rejected = [json.loads(line) for line in (tmp_path / "s" / "rejected.jsonl").read_text().splitlines()]
    assert {Path(row["file"]).name for row in rejected} == {
        "deep.jsonl",
        "surrogate.jsonl",
        "broken.jsonl",
        "empty.json",
        "number.json",
        "binary.parquet",
        "binary.jsonl.gz",
    }
    assert sum(row["file"].endswith("broken.jsonl") for row in rejected) == 5


def test_neither_sources_nor_store_are_taken_for_the_other(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "en.txt", ENGLISH)
    same = ["prepare", f"tokenizer={base_tokenizer}"]
    done = verb(*same, "data=texts", "out=texts/store", check=False)
    assert "is inside data.sources.0.path=texts" in done.stderr
    verb(*same, "data=texts", "out=s")
    write(tmp_path / "s" / "more.txt", ENGLISH)
    done = verb(*same, "data=s/more.txt", "out=s", check=False)
    assert "data.sources.0.path=s/more.txt is in this folder and would be replaced" in done.stderr
    assert (tmp_path / "s" / "more.txt").exists()


def test_dialogues_that_do_not_fit_the_template_are_rejected_with_their_line(
    verb, tmp_path: Path, base_tokenizer: Path
) -> None:
    bad = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}
    write(tmp_path / "talk.jsonl", [*TALKS, bad])
    done = verb("prepare", "data=talk.jsonl", f"tokenizer={base_tokenizer}", "out=s", check=False)
    assert "1 of 6 rows cannot be used (roles must be" in done.stderr
    assert '"line": 6' in done.stderr
    done = verb("prepare", "data=talk.jsonl", f"tokenizer={base_tokenizer}", "out=s", "template=chatml", check=False)
    assert "the tokenizer has no special token <|im_start|>" in done.stderr


def test_a_changed_weight_is_a_changed_store_and_reuses_its_parts(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    write(tmp_path / "en.txt", ENGLISH)
    same = ["prepare", f"tokenizer={base_tokenizer}", "out=s"]
    verb(*same, "data.sources=[{path: en.txt, domain: en, weight: 1.0}]")
    done = verb(*same, "data.sources=[{path: en.txt, domain: en, weight: 2.0}]")
    assert "1 of 1 parts are reused" in done.stdout
    assert TokenStore(tmp_path / "s").manifest["weights"] == {"en": 2.0}
