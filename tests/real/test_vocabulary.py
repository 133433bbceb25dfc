"""Vocabulary expansion on real tokenizers and real text: the figures that the README names."""

import json
import sysconfig
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from fireflyds.config import ExpandConfig
from fireflyds.data.read.sources import read_texts
from fireflyds.tokenizer.base import Base, load_base
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.expansion import Expansion, plan_expansion
from fireflyds.tokenizer.hf_files import write_byte_level
from fireflyds.tokenizer.learn import learn_byte_level
from fireflyds.tokenizer.pieces import read_pieces
from fireflyds.tokenizer.sample import draw_sample
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.tokenizer.vocabulary_merge import unreachable
from fireflyds.types import Encoder

pytestmark = pytest.mark.data

SCRIPTS = Scripts(["Han", "CJK_Punctuation"])
CLUE = "clue_corpus_small_sample_zh.txt"


def documents(folder: Path) -> list[str]:
    return list(read_texts(str(folder / "corpora" / CLUE)))


def tokens(encoder: Encoder, texts: list[str]) -> int:
    return sum(len(encoder.encode(text)) for text in texts)


@pytest.mark.parametrize("name", ["llama2_32000.model", "chinese_llama2_55296.model"])
def test_bytes_of_tokens_sum_to_those_of_the_corpora(data_folder: Path, name: str) -> None:
    encoder = load_encoder(data_folder / "tokenizers" / name)
    table = encoder.token_bytes()
    for line in islice(corpus_lines(data_folder), 0, None, 23):
        # In the middle of text there is no prefix; U+2581 itself is written as the space it stands for.
        if line and "▁" not in line:
            assert table[encoder.encode(line, continues=True)].sum() == len(line.encode()), line


def test_bytes_of_byte_level_tokens_sum_to_those_of_the_corpora(data_folder: Path, byte_level: Path) -> None:
    encoder = load_encoder(byte_level)
    table = encoder.token_bytes()
    for line in islice(corpus_lines(data_folder), 0, None, 23):
        assert table[encoder.encode(line)].sum() == len(line.encode()), line


def source_lines() -> Iterator[str]:
    """Lines of the standard library."""
    place = Path(sysconfig.get_paths()["stdlib"])
    for file in sorted(place.rglob("*.py")):
        if "site-packages" not in file.parts:
            yield from file.read_text(encoding="utf-8", errors="ignore").split("\n")


def corpus_lines(folder: Path) -> Iterator[str]:
    for file in sorted((folder / "corpora").iterdir()):
        for text in file.read_text(encoding="utf-8").split("\n"):
            yield from (text[start : start + 2000] for start in range(0, len(text), 2000))


@pytest.fixture(scope="module")
def byte_level(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level tokenizer of 12,000 pieces, learnt on English."""
    folder = tmp_path_factory.mktemp("byte_level")
    english = [str(data_folder / "corpora" / name) for name in ("wiki_demo_en.txt", "c4_demo_en.jsonl")]
    texts = (text for path in english for text in read_texts(path))
    write_byte_level(learn_byte_level(texts, vocab_size=12_000, max_piece_length=16), folder)
    return folder


def learnt(base: Base, texts: list[str]) -> Expansion:
    config = ExpandConfig(base="base", corpus="zh.txt", out="out", num_pieces=12_000)
    return plan_expansion(config, base, SCRIPTS, [], draw_sample(texts, characters=config.sample_characters, seed=42))


@pytest.fixture(scope="module", params=["llama2", "byte_level"])
def expanded(request, data_folder: Path, byte_level: Path, tmp_path_factory) -> tuple[Base, Expansion, Path]:
    """At most 12,000 rows learnt on the first 2,000 documents."""
    llama2 = data_folder / "tokenizers" / "llama2_32000.model"
    base = load_base(llama2 if request.param == "llama2" else byte_level)
    found = learnt(base, documents(data_folder)[:2000])
    folder = tmp_path_factory.mktemp("expanded")
    base.write(found.plan.steps, folder)
    return base, found, folder


def test_tokens_of_unseen_documents_fall_by_half(expanded, data_folder: Path) -> None:
    base, found, folder = expanded
    assert len(found.plan.steps) <= 12_000
    assert (base.num_tokens + len(found.plan.steps)) % 64 == 0
    unseen = documents(data_folder)[2000:]
    before, after = tokens(base.encoder([]), unseen), tokens(load_encoder(folder), unseen)
    print(f"{len(found.plan.steps):,} rows: {before:,} -> {after:,} tokens ({after / before - 1:+.1%})")
    assert after < 0.5 * before


def test_every_learnt_piece_is_reached(expanded) -> None:
    base, found, folder = expanded
    assert unreachable(base, found.plan, load_encoder(folder)) == []


def test_english_and_source_code_keep_their_ids(expanded, data_folder: Path) -> None:
    base, _, folder = expanded
    old, new = base.encoder([]), load_encoder(folder)
    english = list(read_texts(str(data_folder / "corpora" / "wiki_demo_en.txt")))
    # SentencePiece is fast enough for all of the source code.
    stride = 4 if base.has_fragments else 1
    lines = [line for line in [*english, *islice(source_lines(), 0, None, stride)] if not SCRIPTS.has(line)]
    assert len(lines) > 100_000
    assert [line for line in lines if new.encode(line) != old.encode(line)] == []


def test_auto_tokenizer_agrees_on_all_corpora_and_source_code(expanded, data_folder: Path) -> None:
    folder = expanded[2]
    auto, ours = AutoTokenizer.from_pretrained(folder), load_encoder(folder)
    special = tuple(auto.get_added_vocab())
    lines = [
        line
        for line in [*corpus_lines(data_folder), *islice(source_lines(), 0, None, 5)]
        if line and not any(token in line for token in special)
    ]
    assert len(lines) > 100_000
    for start in range(0, len(lines), 10_000):
        batch = lines[start : start + 10_000]
        ids = auto(batch, add_special_tokens=False)["input_ids"]
        for line, theirs in zip(batch, ids, strict=True):
            mine = ours.encode(line)
            assert theirs == mine, line
            assert ours.decode(mine) == line or "▁" in line
    print(f"{len(lines):,} lines")


def test_the_published_merge_is_reproduced(verb, data_folder: Path, tmp_path: Path) -> None:
    tokenizers = data_folder / "tokenizers"
    verb(
        "expand",
        f"base={tokenizers}/llama2_32000.model",
        f"pieces={tokenizers}/chinese_sp_20000.model",
        "cure=false",
        "vocab_multiple=1",
        "out=merged",
    )
    merged = load_encoder(tmp_path / "merged")
    assert merged.vocab_size == 49_953
    report = json.loads((tmp_path / "merged" / "report.json").read_text())
    assert report["pieces"]["added"] == 17_953
    assert len(report["dead"]) == 345


@pytest.mark.parametrize(("corpus", "most"), [("", 455_500), (CLUE, 454_000)])
def test_the_published_vocabulary_is_cured_within_its_size(
    verb, data_folder: Path, tmp_path: Path, corpus: str, most: int
) -> None:
    tokenizers = data_folder / "tokenizers"
    verb(
        "expand",
        f"base={tokenizers}/llama2_32000.model",
        f"pieces={tokenizers}/chinese_llama2_55296.model",
        "max_vocab_size=55296",
        "out=cured",
        *([f"corpus={data_folder}/corpora/{corpus}"] if corpus else []),
    )
    cured, published = load_encoder(tmp_path / "cured"), load_encoder(tokenizers / "chinese_llama2_55296.model")
    assert cured.vocab_size == 55_296
    report = json.loads((tmp_path / "cured" / "report.json").read_text())
    assert report["dead"] == []
    assert [check["failed"] for check in report["checks"]] == [0, 0, 0, 0]
    texts = documents(data_folder)
    assert tokens(published, texts) == 457_920
    assert tokens(cured, texts) < most
    assert tokens(load_encoder(tokenizers / "llama2_32000.model"), texts) == 1_001_627


def test_the_published_pieces_merge_into_a_byte_level_base(data_folder: Path, byte_level: Path) -> None:
    base = load_base(byte_level)
    config = ExpandConfig(base="base", pieces="list", out="out")
    texts = read_pieces(data_folder / "tokenizers" / "chinese_sp_20000.model")
    found = plan_expansion(config, base, SCRIPTS, texts, None)
    new = base.encoder(found.plan.steps)
    assert unreachable(base, found.plan, new) == []
    sample = list(islice(corpus_lines(data_folder), 3000))
    assert [line for line in sample if new.decode(new.encode(line)) != line] == []
