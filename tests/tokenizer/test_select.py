"""Tokens saved by a piece, and the knee of the size curve."""

from pathlib import Path

import numpy as np
import pytest
from bases import KINDS
from samples import CHINESE

from fireflyds.config import VocabSizeRule
from fireflyds.tokenizer.base import load_base
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.tokenizer.select import Point, average_log_probability, by_saving, curve, knee, savings, shares
from fireflyds.tokenizer.vocabulary_merge import plan_merge, unreachable

SCRIPTS = Scripts(["Han", "CJK_Punctuation"])
PIECES = ["特产", "的特产是", "流经", "河是", "青岭镇", "清水河", "一天的路程", "县城", "离县城有"]


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_savings_sum_to_the_tokens_saved(kind: str, tmp_path: Path) -> None:
    base = load_base(KINDS[kind](tmp_path / "base"))
    plan = plan_merge(base, PIECES, SCRIPTS)
    saved = savings(base, plan, CHINESE)
    base_tokens, expanded_tokens = (
        sum(len(encoder.encode(text)) for text in CHINESE) for encoder in (base.encoder([]), base.encoder(plan.steps))
    )
    assert sum(saved.values()) == base_tokens - expanded_tokens > 1000


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_the_best_steps_include_their_intermediates(kind: str, tmp_path: Path) -> None:
    base = load_base(KINDS[kind](tmp_path / "base"))
    full = plan_merge(base, PIECES, SCRIPTS)
    saved = savings(base, full, CHINESE)
    order = by_saving(full, saved)
    for rows in (5, len(order) // 2, len(order) - 3):
        plan = plan_merge(base, PIECES, SCRIPTS)
        plan.keep(set(order[:rows]), "too many")
        assert len(plan.steps) == rows
        assert unreachable(base, plan, base.encoder(plan.steps)) == []
        assert set(plan.intermediates) <= {step.piece for step in plan.steps}


def test_the_curve_decreases_from_the_base_to_the_full_plan(tmp_path: Path) -> None:
    base = load_base(KINDS["byte_level"](tmp_path / "base"))
    plan = plan_merge(base, PIECES, SCRIPTS)
    points = curve(base, plan, by_saving(plan, savings(base, plan, CHINESE)), CHINESE)
    tokens = [point.tokens for point in points]
    assert (points[0].rows, points[-1].rows) == (0, len(plan.steps))
    assert tokens == sorted(tokens, reverse=True)
    assert tokens[0] == sum(len(base.encoder([]).encode(text)) for text in CHINESE)
    assert points[-1].alp > points[0].alp


def test_average_log_probability_equals_that_of_unigrams() -> None:
    counts = np.array([2, 2, 4, 0])
    expected = (2 * np.log(2 / 8) + 2 * np.log(2 / 8) + 4 * np.log(4 / 8)) / 3
    assert average_log_probability(counts, 3) == pytest.approx(expected)


def test_the_knee_is_the_point_farthest_from_the_chord() -> None:
    points = [Point(0, 100, -10), Point(10, 40, -9), Point(20, 30, -2), Point(30, 25, -1), Point(40, 20, 0)]
    assert knee(points, VocabSizeRule.knee).rows == 10
    assert knee(points, VocabSizeRule.alp).rows == 20
    assert knee([Point(0, 5, -1), Point(9, 5, -1)], VocabSizeRule.knee).rows == 9


def test_shares_sum_to_one(tmp_path: Path) -> None:
    token_shares = shares(load_base(KINDS["sentencepiece"](tmp_path / "base")).encoder([]), CHINESE)
    assert token_shares.sum() == pytest.approx(1.0)
    assert token_shares.max() > 0.05
