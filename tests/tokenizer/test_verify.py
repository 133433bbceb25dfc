"""Checks of an expansion fail where a property does not hold."""

from pathlib import Path

import pytest
from samples import CHINESE, ENGLISH

from fireflyds.tokenizer.base import Base, load_base
from fireflyds.tokenizer.bpe import Step
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.tokenizer.verify import HARD_LINES, verify_expansion
from fireflyds.tokenizer.vocabulary_merge import MergePlan, plan_merge

SCRIPTS = Scripts(["Han", "CJK_Punctuation"])


def test_a_valid_merge_passes_every_check(base_tokenizer: Path, tmp_path: Path) -> None:
    base = load_base(base_tokenizer)
    plan = plan_merge(base, ["意大利", "河流"], SCRIPTS)
    base.write(plan.steps, tmp_path)
    checks = verify_expansion(base, plan, SCRIPTS, tmp_path, [*CHINESE, *ENGLISH])
    assert all(check.passed for check in checks)
    assert checks[0].tried == len(plan.steps)
    assert checks[2].tried > len(CHINESE) + len(ENGLISH) + len(HARD_LINES)
    assert len(ENGLISH) <= checks[1].tried < checks[2].tried


def first_two_tokens(base: Base) -> list[str]:
    encoder = base.encoder([])
    return ["".join(encoder.token(index) for index in encoder.encode(ENGLISH[0])[:2])]


@pytest.mark.parametrize(
    ("pieces", "tied", "violated_check"),
    [
        (lambda base: ["意大利"], False, "every new piece is reached"),
        (first_two_tokens, False, "text without new characters keeps its ids"),
        (lambda base: ["的特", "镇的", "镇", "的", "特"], True, "AutoTokenizer gives the same ids"),
    ],
)
def test_violations_fail_their_check(base_tokenizer: Path, tmp_path: Path, pieces, tied, violated_check) -> None:
    base = load_base(base_tokenizer, tied=tied)
    plan = MergePlan(steps=[Step(base.spelled(piece), None) for piece in pieces(base)])
    base.write(plan.steps, tmp_path)
    failed = {
        check.rule
        for check in verify_expansion(base, plan, SCRIPTS, tmp_path, [*CHINESE, *ENGLISH])
        if not check.passed
    }
    assert violated_check in failed
