"""How many rows a configuration comes to: by number, by the curve, by the limit, by the multiple."""

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
GIVEN = ["的特产是", "流经青岭镇", "清水河", "一天的路程", "龘"]


@pytest.fixture(params=["sentencepiece", "llama3"])
def base(request, tmp_path: Path) -> Base:
    return load_base(KINDS[request.param](tmp_path / "base"))


def expansion(base: Base, *, given: list[str] | None = None, corpus: bool = True, **options) -> Expansion:
    wanted = {"corpus": "zh.txt"} if corpus else {}
    wanted |= {"pieces": "list.txt"} if given else {"num_pieces": 70, "min_count": 1}
    config = ExpandConfig(base="base", out="out", **(wanted | {"vocab_multiple": 1} | options))
    sample = draw_sample(CHINESE, characters=config.sample_characters, seed=1) if corpus else None
    found = plan_expansion(config, base, SCRIPTS, given or [], sample)
    assert unreachable(base, found.plan, base.encoder(found.plan.steps)) == []
    return found


def test_a_fixed_size_is_kept_and_a_multiple_is_reached_from_below(base: Base) -> None:
    assert len(expansion(base).plan.steps) == 70
    size = base.num_tokens + len(expansion(base, vocab_multiple=32).plan.steps)
    assert size % 32 == 0
    assert 0 <= base.num_tokens + 70 - size < 32


@pytest.mark.parametrize("by", [VocabSizeRule.knee, VocabSizeRule.alp])
def test_the_curve_chooses_the_size(base: Base, by: VocabSizeRule) -> None:
    found = expansion(base, size=by)
    assert len(found.plan.steps) == found.knees[by.name] == len(found.saved) < 70
    points = {point.rows: point.tokens for point in found.points}
    assert points[found.knees[by.name]] < points[0]


def test_a_learnt_piece_that_saves_too_little_is_left_out(base: Base) -> None:
    assert min(expansion(base, min_count=30).saved.values()) >= 30 > min(expansion(base).saved.values())


def test_given_pieces_are_filled_up_to_the_multiple(base: Base) -> None:
    found = expansion(base, given=GIVEN, corpus=False, vocab_multiple=64)
    assert (base.num_tokens + len(found.plan.steps)) % 64 == 0
    assert 0 < len(found.plan.filled) < 64
    assert {base.spelled(piece) for piece in GIVEN} <= {step.piece for step in found.plan.steps}


def test_under_a_limit_the_pieces_that_save_most_stay(base: Base) -> None:
    whole = expansion(base, given=GIVEN)
    limit = base.num_tokens + len(whole.plan.steps) - 6
    found = expansion(base, given=GIVEN, max_vocab_size=limit)
    assert len(found.plan.steps) == len(whole.plan.steps) - 6
    assert base.spelled("龘") not in {step.piece for step in found.plan.steps}
    assert found.plan.dropped[base.spelled("龘")] == f"left out for max_vocab_size={limit}: others save more"


def test_pieces_that_the_base_cuts_or_rewrites_are_left_out(tmp_path: Path) -> None:
    folder = KINDS["llama3"](tmp_path / "base")
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["normalizer"] = {"type": "NFC"}  # Qwen's
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    base = load_base(folder)
    found = expansion(base, given=["河流", "1、", "河\uf900", "山川"], corpus=False)
    assert {base.text(piece) for piece in found.plan.dropped} == {"1、", "河\uf900"}
    assert {"河流", "山川"} <= {base.text(step.piece) for step in found.plan.steps}


def test_a_limit_or_multiple_that_leaves_no_row_is_refused(base: Base) -> None:
    with pytest.raises(UserError, match=r"no multiple of 100000 lies between, the next is 100,000. Ask for more"):
        expansion(base, vocab_multiple=100_000)
    with pytest.raises(UserError, match=f"max_vocab_size={base.num_tokens}"):
        expansion(base, given=GIVEN, max_vocab_size=base.num_tokens)


def test_uncured_pieces_are_appended_as_they_are(tmp_path: Path) -> None:
    base = load_base(KINDS["sentencepiece"](tmp_path / "base"), tied=True)
    config = ExpandConfig(base="base", out="out", pieces="list.txt", cure=False, vocab_multiple=1)
    found = plan_expansion(config, base, SCRIPTS, ["河", "意大利", "e"], None)
    assert [step.piece for step in found.plan.steps] == ["河", "意大利"]
    assert unreachable(base, found.plan, base.encoder(found.plan.steps)) == ["意大利"]


@pytest.mark.parametrize(
    ("options", "words"),
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
def test_options_that_contradict_each_other_are_refused(options, words: str) -> None:
    with pytest.raises(UserError, match=words):
        ExpandConfig(**({"base": "b", "out": "o"} | options))


def test_a_corpus_that_gives_nothing_says_why(base: Base) -> None:
    with pytest.raises(UserError, match=r"no piece of Han, CJK_Punctuation saves min_count=100000 tokens"):
        expansion(base, min_count=100_000)
