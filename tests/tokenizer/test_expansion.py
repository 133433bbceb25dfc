"""The number of added rows by configuration: fixed size, knee of the curve, limit, multiple."""

import json
from pathlib import Path

import pytest
from bases import KINDS
from samples import CHINESE

from fireflyds.config import ExpandConfig, VocabSizeRule
from fireflyds.errors import UserError
from fireflyds.tokenizer.base import Base, load_base
from fireflyds.tokenizer.expansion import Expansion, plan_expansion
from fireflyds.tokenizer.sample import draw_sample
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.tokenizer.vocabulary_merge import unreachable

SCRIPTS = Scripts(["Han", "CJK_Punctuation"])
GIVEN_PIECES = ["的特产是", "流经青岭镇", "清水河", "一天的路程", "龘"]


@pytest.fixture(params=["sentencepiece", "llama3"])
def base(request, tmp_path: Path) -> Base:
    return load_base(KINDS[request.param](tmp_path / "base"))


def expansion(base: Base, *, given_pieces: list[str] | None = None, corpus: bool = True, **options) -> Expansion:
    required = {"corpus": "zh.txt"} if corpus else {}
    required |= {"pieces": "list.txt"} if given_pieces else {"num_pieces": 70, "min_count": 1}
    config = ExpandConfig(base="base", out="out", **(required | {"vocab_multiple": 1} | options))
    sample = draw_sample(CHINESE, characters=config.sample_characters, seed=1) if corpus else None
    result = plan_expansion(config, base, SCRIPTS, given_pieces or [], sample)
    assert unreachable(base, result.plan, base.encoder(result.plan.steps)) == []
    return result


def test_num_pieces_is_exact_and_vocab_multiple_rounds_down(base: Base) -> None:
    assert len(expansion(base).plan.steps) == 70
    size = base.num_tokens + len(expansion(base, vocab_multiple=32).plan.steps)
    assert size % 32 == 0
    assert 0 <= base.num_tokens + 70 - size < 32


@pytest.mark.parametrize("rule", [VocabSizeRule.knee, VocabSizeRule.alp])
def test_the_size_is_the_knee_of_the_curve(base: Base, rule: VocabSizeRule) -> None:
    result = expansion(base, size=rule)
    assert len(result.plan.steps) == result.knees[rule.name] == len(result.saved) < 70
    points = {point.rows: point.tokens for point in result.points}
    assert points[result.knees[rule.name]] < points[0]


def test_learned_pieces_below_min_count_are_dropped(base: Base) -> None:
    assert min(expansion(base, min_count=30).saved.values()) >= 30 > min(expansion(base).saved.values())


def test_given_pieces_are_padded_to_the_multiple(base: Base) -> None:
    result = expansion(base, given_pieces=GIVEN_PIECES, corpus=False, vocab_multiple=64)
    assert (base.num_tokens + len(result.plan.steps)) % 64 == 0
    assert 0 < len(result.plan.filled) < 64
    assert {base.spelled(piece) for piece in GIVEN_PIECES} <= {step.piece for step in result.plan.steps}


def test_max_vocab_size_keeps_the_pieces_that_save_most(base: Base) -> None:
    unlimited = expansion(base, given_pieces=GIVEN_PIECES)
    limit = base.num_tokens + len(unlimited.plan.steps) - 6
    limited = expansion(base, given_pieces=GIVEN_PIECES, max_vocab_size=limit)
    assert len(limited.plan.steps) == len(unlimited.plan.steps) - 6
    assert base.spelled("龘") not in {step.piece for step in limited.plan.steps}
    assert limited.plan.dropped[base.spelled("龘")] == f"left out for max_vocab_size={limit}: others save more"


def test_pieces_that_the_base_splits_or_normalises_are_dropped(tmp_path: Path) -> None:
    folder = KINDS["llama3"](tmp_path / "base")
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["normalizer"] = {"type": "NFC"}  # Qwen's
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    base = load_base(folder)
    result = expansion(base, given_pieces=["河流", "1、", "河\uf900", "山川"], corpus=False)
    assert {base.text(piece) for piece in result.plan.dropped} == {"1、", "河\uf900"}
    assert {"河流", "山川"} <= {base.text(step.piece) for step in result.plan.steps}


def test_a_limit_or_multiple_that_leaves_no_row_is_refused(base: Base) -> None:
    with pytest.raises(UserError, match=r"no multiple of 100000 lies between, the next is 100,000. Ask for more"):
        expansion(base, vocab_multiple=100_000)
    with pytest.raises(UserError, match=f"max_vocab_size={base.num_tokens}"):
        expansion(base, given_pieces=GIVEN_PIECES, max_vocab_size=base.num_tokens)


def test_uncured_pieces_are_appended_as_they_are(tmp_path: Path) -> None:
    base = load_base(KINDS["sentencepiece"](tmp_path / "base"), tied=True)
    config = ExpandConfig(base="base", out="out", pieces="list.txt", cure=False, vocab_multiple=1)
    result = plan_expansion(config, base, SCRIPTS, ["河", "意大利", "e"], None)
    assert [step.piece for step in result.plan.steps] == ["河", "意大利"]
    assert unreachable(base, result.plan, base.encoder(result.plan.steps)) == ["意大利"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pieces": "a", "num_pieces": 5, "corpus": "c"}, "Give either pieces="),
        ({}, "Give either pieces="),
        ({"num_pieces": 5}, "needs text to learn from"),
        ({"num_pieces": 5, "corpus": "c", "cure": False}, "cure=false: appends given pieces"),
        ({"pieces": "a", "size": VocabSizeRule.knee}, "read from a curve on text"),
        ({"pieces": "a", "other": "b"}, "only with report=only"),
        ({"pieces": "a", "out": ""}, "out: is not set"),
    ],
)
def test_contradictory_options_are_refused(options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ExpandConfig(**({"base": "b", "out": "o"} | options))


def test_a_corpus_without_useful_pieces_is_refused(base: Base) -> None:
    with pytest.raises(UserError, match=r"no piece of Han, CJK_Punctuation saves min_count=100000 tokens"):
        expansion(base, min_count=100_000)
