"""The expand verb on the command line: its output, and bad input, which is refused and leaves no files."""

import json
from pathlib import Path

import datasets
import kinds
import pytest
import torch
from bases import KINDS
from samples import CHINESE, ENGLISH
from transformers import AutoModelForCausalLM, AutoTokenizer

from fireflyds.testing.models import save_tiny_llama
from fireflyds.tokenizer.encoder import load_encoder


def write(path: Path, texts: list[str]) -> None:
    path.write_text("\n".join(texts), encoding="utf-8")


def test_a_byte_level_tokenizer_is_trained_and_expanded_from_a_saved_dataset(verb, tmp_path: Path) -> None:
    write(tmp_path / "en.txt", ENGLISH)
    datasets.Dataset.from_list([{"text": text} for text in CHINESE]).save_to_disk(tmp_path / "zh")
    verb("learn", "corpus=en.txt", "kind=byte_level", "vocab_size=400", "out=base")
    completed = verb(
        "expand",
        "base=base",
        "corpus=zh",
        "num_pieces=200",
        "min_count=1",
        "vocab_multiple=16",
        "out=merged",
        "texts.zh=zh",
        "texts.en=en.txt",
    )
    assert "holds: every new piece is reached" in completed.stdout
    assert {path.name for path in (tmp_path / "merged").glob("[!.]*")} == {
        "tokenizer.json",
        "tokenizer_config.json",
        "report.json",
        "report.md",
        "report.png",
    }
    report = json.loads((tmp_path / "merged" / "report.json").read_text())
    assert report["vocab_size_after"] % 16 == 0
    assert [check["failed"] for check in report["checks"]] == [0, 0, 0, 0]
    assert report["checks"][1]["tried"] > len(ENGLISH)
    english, chinese = report["measured"][0], report["measured"][1]
    assert (english["domain"], english["before"], chinese["language"]) == ("en", english["after"], "Chinese")
    assert chinese["after"]["tokens"] < 0.5 * chinese["before"]["tokens"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert len(tokenizer) == report["vocab_size_after"]
    report_text = (tmp_path / "merged" / "report.md").read_text()
    for heading in ("## Fit", "## Cost of the new rows", "## How many pieces", "Dead pieces: 0"):
        assert heading in report_text


def test_two_tokenizers_are_compared_without_a_merge(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    write(tmp_path / "zh.txt", CHINESE)
    KINDS["byte_level"](tmp_path / "other")
    completed = verb("expand", "report=only", f"base={base_tokenizer}", "other=other", "corpus=zh.txt", "out=compared")
    assert "| corpus | Chinese |" in completed.stdout
    assert sorted(path.name for path in (tmp_path / "compared").glob("[!.]*")) == ["comparison.json", "comparison.md"]
    rows = json.loads((tmp_path / "compared" / "comparison.json").read_text())["measured"]
    assert rows[0]["before"]["characters"] == sum(map(len, CHINESE))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["base=nothing", "pieces=zh_pieces.txt"], "base=nothing: no such file or directory"),
        (
            ["base=empty", "pieces=zh_pieces.txt"],
            "no tokenizer found (neither tokenizer.model nor tokenizer.json)",
        ),
        (["base=BASE", "pieces=double.txt"], "double.txt:2: piece '河' is already in line 1"),
        (
            ["base=BASE", "pieces=english.txt"],
            "2 cannot be merged, the first 'xyzzy': no character of Han, CJK_Punctuation",
        ),
        (["base=BASE", "corpus=en.txt", "num_pieces=50"], "no Han or CJK_Punctuation text"),
        (["base=BASE", "pieces=zh_pieces.txt", "max_vocab_size=420"], "max_vocab_size=420, vocab_multiple=64"),
        (["base=BASE", "pieces=zh_pieces.txt", "cure=false", "max_vocab_size=401"], "max_vocab_size=401"),
        (["base=BASE", "pieces=zh_pieces.txt", "out=en.txt/under"], "cannot be written"),
        (
            ["base=BASE", "pieces=mine/pieces.txt", "out=mine"],
            "pieces=mine/pieces.txt is in this folder and would be replaced",
        ),
        (["base=BASE", "pieces=zh_pieces.txt", "texts.新闻=nowhere.txt"], "nowhere.txt: no such file"),
        (["base=BASE", "pieces=zh_pieces.txt", "out=/"], "out=/"),
        (["base=BASE", "corpus=hf:", "num_pieces=50"], "hf:: cannot be read as a data set"),
        (["base=BASE", "corpus=hf:no/such", "num_pieces=50"], "hf:no/such: cannot be read as a data set"),
    ],
)
def test_bad_input_is_named_and_leaves_no_files(
    verb, tmp_path: Path, base_tokenizer: Path, arguments: list[str], message: str
) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "double.txt", ["河", "河"])
    write(tmp_path / "english.txt", ["xyzzy", "plugh"])
    write(tmp_path / "zh_pieces.txt", ["河流", "山川"])
    write(tmp_path / "en.txt", ENGLISH)
    (tmp_path / "mine").mkdir()
    write(tmp_path / "mine" / "pieces.txt", ["河流"])
    (tmp_path / "mine" / "report.json").write_text("{}")
    files_before = sorted(path.name for path in tmp_path.iterdir())
    arguments = [argument.replace("BASE", str(base_tokenizer)) for argument in arguments]
    out = [] if any(argument.startswith("out=") for argument in arguments) else ["out=out"]
    completed = verb("expand", *arguments, *out, check=False, env={"HF_HUB_OFFLINE": "1"})
    assert completed.returncode == 2, completed.stderr
    assert message in completed.stderr
    assert "Traceback" not in completed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == files_before


def test_a_base_without_byte_pieces_is_refused_or_gets_them(verb, tmp_path: Path) -> None:
    """Characters that it lacks are counted in a store, and after `add_bytes` every text comes back."""
    base = kinds.without_byte_fallback(tmp_path / "base")
    (tmp_path / "a.txt").write_text("the river 龘\n", encoding="utf-8")
    prepared = verb("prepare", "data=a.txt", f"tokenizer={base}", "out=s")
    counts = json.loads((tmp_path / "s" / "manifest.json").read_text())["totals"]
    assert counts["unknown"] == 1
    assert "1 tokens stand for characters that the vocabulary lacks" in prepared.stdout
    assert "has no byte fallback" in prepared.stderr
    save_tiny_llama(base, vocab_size=load_encoder(base).vocab_size)
    (tmp_path / "p.txt").write_text("人工\n")
    refused = verb("expand", f"base={base}", "pieces=p.txt", "out=e", "vocab_multiple=1", check=False)
    assert refused.returncode == 2
    assert "add_bytes=true" in refused.stderr
    verb("expand", f"base={base}", "pieces=p.txt", "out=e", "vocab_multiple=1", "add_bytes=true")
    encoder, model = load_encoder(tmp_path / "e"), AutoModelForCausalLM.from_pretrained(tmp_path / "e")
    assert encoder.unknown_id is None
    assert encoder.decode(encoder.encode("the 龘 人工")) == "the 龘 人工"
    rows = model.get_input_embeddings().weight
    old = AutoModelForCausalLM.from_pretrained(base).get_input_embeddings().weight
    assert len(rows) == encoder.vocab_size
    torch.testing.assert_close(rows[encoder.token_id("<0x0A>")], old.mean(0))
    assert torch.equal(rows[: len(old)], old)
