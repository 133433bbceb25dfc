"""The prepare verb: reuse of parts between runs, interruption, bad rows, and its output."""

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


DIALOGUES = [
    {"messages": [{"role": "user", "content": f"问题{n}？"}, {"role": "assistant", "content": "回答。"}]}
    for n in range(5)
]


def test_a_store_holds_every_document_in_order_with_its_domain_and_language(
    verb, tmp_path: Path, base_tokenizer: Path, encoder
) -> None:
    write(tmp_path / "en.txt", ENGLISH)
    write(tmp_path / "zh.jsonl", [{"text": text} for text in CHINESE] + [{"text": CHINESE[0]}])
    write(tmp_path / "talk.jsonl", DIALOGUES)
    sources = (
        "data.sources=[{path: en.txt, domain: en, language: en}, {path: zh.jsonl, domain: zh, language: zh, weight: "
        "3.0, max_documents: 10}, {path: talk.jsonl, domain: chat, language: zh}]"
    )
    completed = verb("prepare", sources, f"tokenizer={base_tokenizer}", "out=s", "clean.duplicates=exact", "workers=2")
    store = TokenStore(tmp_path / "s")
    decoded_texts = texts(store, encoder)
    assert decoded_texts[: len(ENGLISH)] == ENGLISH
    assert [store.domains[number] for number in store.domain_ids] == ["en"] * len(ENGLISH) + ["zh"] * 10 + ["chat"] * 5
    assert set(decoded_texts[len(ENGLISH) : len(ENGLISH) + 10]) < set(CHINESE)
    assert store.languages[store.language_ids[-1]] == "zh"
    counts = store.manifest["per_domain"]["zh"]
    assert (counts["read"], counts["documents"]) == (len(CHINESE) + 1, 10)
    assert counts["reasons"] == {"duplicate": 1, "beyond max_documents": len(CHINESE) - 10}
    assert store.manifest["weights"] == {"zh": 3.0}
    assert store.manifest["per_domain"]["chat"]["formats"] == {"messages": 5}
    assert "zh: dropped 1: duplicate" in completed.stdout


def test_only_parts_affected_by_a_change_are_made_again(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    write(tmp_path / "en.txt", ENGLISH)
    write(tmp_path / "talk.jsonl", DIALOGUES)
    sources = "data.sources=[{path: en.txt}, {path: talk.jsonl}]"
    command = ["prepare", sources, f"tokenizer={base_tokenizer}", "out=s", "workers=1"]
    verb(*command)
    inodes_before = {file.name: file.stat().st_ino for file in (tmp_path / "s" / "parts").glob("*.ids")}
    assert "nothing to do" in verb(*command).stdout
    assert "1 of 2 parts are reused" in verb(*command, "template=vicuna").stdout
    write(tmp_path / "talk.jsonl", DIALOGUES[:3])
    assert "1 of 2 parts are reused" in verb(*command).stdout
    inodes_after = {file.name: file.stat().st_ino for file in (tmp_path / "s" / "parts").glob("*.ids")}
    assert len(inodes_after) == 2
    assert len(inodes_before.items() & inodes_after.items()) == 1
    assert TokenStore(tmp_path / "s").manifest["totals"]["dialogues"] == 3
    assert "are reused" not in verb(*command, "clean.simplify=true").stdout


@pytest.mark.chaos
@pytest.mark.parametrize("signal_number", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_prepare_resumes_and_reuses_its_parts(
    tmp_path: Path, base_tokenizer: Path, signal_number: int
) -> None:
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
    # A background process ignores SIGINT, and its children inherit that.
    reset_sigint = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, preexec_fn=reset_sigint)
    parts_folder = tmp_path / ".s.partial" / "parts"
    for _ in range(1200):
        if parts_folder.exists() and list(parts_folder.glob("*.json")):
            break
        time.sleep(0.05)
    os.killpg(process.pid, signal_number)
    process.wait()
    assert not (tmp_path / "s").exists()
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "parts are reused" in completed.stdout
    assert len(TokenStore(tmp_path / "s")) == len(ENGLISH) * (5 * parts.PART_BYTES // len(lines))
    assert not (tmp_path / ".s.partial").exists()


def test_too_many_unreadable_rows_are_an_error_and_leave_no_store(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    write(tmp_path / "a.jsonl", [{"text": "fine"}] * 20 + ["{broken"] * 2)
    completed = verb("prepare", "data=a.jsonl", f"tokenizer={base_tokenizer}", "out=s", check=False)
    assert completed.returncode == 2
    assert "max_rejected=0.01: 2 of 22 rows cannot be used (not JSON (2))" in completed.stderr
    assert '"line": 21' in completed.stderr
    assert not (tmp_path / "s").exists()
    assert (
        "1 of 1 parts are reused"
        in verb("prepare", "data=a.jsonl", f"tokenizer={base_tokenizer}", "out=s", "max_rejected=0.1").stdout
    )


def test_inspect_prints_samples_with_their_learned_spans_and_writes_no_files(
    verb, tmp_path: Path, base_tokenizer: Path
) -> None:
    write(tmp_path / "talk.jsonl", DIALOGUES)
    stdout = verb("prepare", "data=talk.jsonl", f"tokenizer={base_tokenizer}", "inspect=2").stdout
    assert stdout.count("⟦回答。</s>⟧") == 2
    assert "<s>问题0？</s>" in stdout
    assert [path.name for path in tmp_path.iterdir()] == ["talk.jsonl"]


def test_stats_only_prints_the_table_of_a_store(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    write(tmp_path / "en.txt", ENGLISH)
    verb("prepare", "data=en.txt", f"tokenizer={base_tokenizer}", "out=s")
    stdout = verb("prepare", "out=s", "stats=only").stdout
    assert f"{len(ENGLISH):,}" in stdout
    assert "length in tokens" in stdout
    assert (tmp_path / "s" / "stats.png").stat().st_size > 5_000


def test_malformed_files_are_stored_or_rejected_without_a_traceback(verb, tmp_path: Path, base_tokenizer: Path) -> None:
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
    completed = verb("prepare", "data=nasty", f"tokenizer={base_tokenizer}", "out=s", "max_rejected=1", "workers=2")
    assert "Traceback" not in completed.stderr
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


def test_sources_inside_the_store_and_a_store_inside_the_sources_are_refused(
    verb, tmp_path: Path, base_tokenizer: Path
) -> None:
    (tmp_path / "texts").mkdir()
    write(tmp_path / "texts" / "en.txt", ENGLISH)
    command = ["prepare", f"tokenizer={base_tokenizer}"]
    completed = verb(*command, "data=texts", "out=texts/store", check=False)
    assert "is inside data.sources.0.path=texts" in completed.stderr
    verb(*command, "data=texts", "out=s")
    write(tmp_path / "s" / "more.txt", ENGLISH)
    completed = verb(*command, "data=s/more.txt", "out=s", check=False)
    assert "data.sources.0.path=s/more.txt is in this folder and would be replaced" in completed.stderr
    assert (tmp_path / "s" / "more.txt").exists()


def test_dialogues_that_do_not_fit_the_template_are_rejected_with_their_line(
    verb, tmp_path: Path, base_tokenizer: Path
) -> None:
    invalid_dialogue = {"messages": [{"role": "assistant", "content": "a"}, {"role": "user", "content": "b"}]}
    write(tmp_path / "talk.jsonl", [*DIALOGUES, invalid_dialogue])
    completed = verb("prepare", "data=talk.jsonl", f"tokenizer={base_tokenizer}", "out=s", check=False)
    assert "1 of 6 rows cannot be used (roles must be" in completed.stderr
    assert '"line": 6' in completed.stderr
    completed = verb(
        "prepare", "data=talk.jsonl", f"tokenizer={base_tokenizer}", "out=s", "template=chatml", check=False
    )
    assert "the tokenizer has no special token <|im_start|>" in completed.stderr


@pytest.mark.parametrize("damage", ["cut ids", "flipped ids", "no index", "cut index", "cut counts"])
def test_a_damaged_store_is_made_again(verb, tmp_path: Path, base_tokenizer: Path, damage: str) -> None:
    write(tmp_path / "en.txt", ENGLISH)
    command = ["prepare", "data=en.txt", f"tokenizer={base_tokenizer}", "out=s", "workers=1"]
    verb(*command)
    store = tmp_path / "s"
    intact = {file.relative_to(store): file.read_bytes() for file in store.rglob("*.ids")}
    (ids,), (counts,) = store.glob("parts/*.ids"), store.glob("parts/*.json")
    index = store / "index" / "length.npy"
    match damage:
        case "cut ids":
            ids.write_bytes(ids.read_bytes()[:-2])
        case "flipped ids":
            # Equal in size, so the store is only made again for another reason.
            ids.write_bytes(bytes([ids.read_bytes()[0] ^ 1]) + ids.read_bytes()[1:])
            index.unlink()
        case "no index":
            index.unlink()
        case "cut index":
            index.write_bytes(index.read_bytes()[:-1])
        case "cut counts":
            counts.write_text(counts.read_text()[:-5])
            index.unlink()
    completed = verb(*command)
    assert "it is made again" in completed.stderr
    assert ("are reused" in completed.stdout) == (damage in ("no index", "cut index"))
    assert {file.relative_to(store): file.read_bytes() for file in store.rglob("*.ids")} == intact
    assert "nothing to do" in verb(*command).stdout


def test_a_stricter_max_rejected_refuses_a_complete_store(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    write(tmp_path / "talk.jsonl", [*DIALOGUES * 20, {"unknown": 1}])
    command = ["prepare", "data=talk.jsonl", f"tokenizer={base_tokenizer}", "out=s"]
    verb(*command)
    completed = verb(*command, "max_rejected=0", check=False)
    assert completed.returncode == 2
    assert "max_rejected=0.0: 1 of 101 rows cannot be used" in completed.stderr
    (tmp_path / "cut.json").write_text('[{"text": "' + "x" * 5000)
    command = ["prepare", "data.sources=[{path: talk.jsonl}, {path: cut.json}]", f"tokenizer={base_tokenizer}", "out=c"]
    verb(*command, "max_rejected=1")
    completed = verb(*command, "max_rejected=0.1", check=False)
    assert "bytes cannot be read to their end" in completed.stderr


def test_a_damaged_manifest_is_written_again(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    write(tmp_path / "en.txt", ENGLISH)
    command = ["prepare", "data=en.txt", f"tokenizer={base_tokenizer}", "out=s"]
    verb(*command)
    manifest = tmp_path / "s" / "manifest.json"
    text = manifest.read_text()
    manifest.write_text(text[:-9])
    assert "it is made again" in verb(*command).stderr
    assert json.loads(manifest.read_text()) == json.loads(text)


def test_unread_keys_and_rendered_text_are_counted(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    rendered = {"text": "<|im_start|>user\nhello<|im_end|>", "url": "x"}
    rows = [*DIALOGUES, *(dialogue | {"source": "web"} for dialogue in DIALOGUES[:2]), rendered]
    write(tmp_path / "talk.jsonl", rows)
    completed = verb("prepare", "data=talk.jsonl", f"tokenizer={base_tokenizer}", "out=s")
    counts = TokenStore(tmp_path / "s").manifest["per_domain"]["text"]
    assert counts["unread"] == {"source": 2, "url": 1}
    assert counts["markers"] == {"<|im_start|>": 1}
    assert "text: key source not read: 2 rows" in completed.stdout
    assert "text: 1 rows hold text already rendered in a chat template (<|im_start|>)" in completed.stdout
    assert "template=chatml" in completed.stdout


def test_a_changed_weight_changes_the_store_and_reuses_its_parts(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    write(tmp_path / "en.txt", ENGLISH)
    command = ["prepare", f"tokenizer={base_tokenizer}", "out=s"]
    verb(*command, "data.sources=[{path: en.txt, domain: en, weight: 1.0}]")
    completed = verb(*command, "data.sources=[{path: en.txt, domain: en, weight: 2.0}]")
    assert "1 of 1 parts are reused" in completed.stdout
    assert TokenStore(tmp_path / "s").manifest["weights"] == {"en": 2.0}
