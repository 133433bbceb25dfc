import dataclasses

import pytest

from fireflyds.pipelines.demo_report import checks, report, table, training

PASSING_FIGURES = {
    "tokens_per_char_zh_before": 3.0, "tokens_per_char_zh_after": 0.6,
    "bits_per_byte_zh_base": 2.0, "bits_per_byte_zh_unexpanded": 1.5,
    "bits_per_byte_zh_cpt": 1.2, "bits_per_byte_zh_sft": 1.3,
    "bits_per_byte_en_base": 1.0, "bits_per_byte_en_unexpanded": 1.0,
    "bits_per_byte_en_cpt": 1.04, "bits_per_byte_en_sft": 1.1,
    "accuracy_base": 0.25, "accuracy_unexpanded": 0.3, "accuracy_cpt": 0.4,
    "accuracy_sft": 0.41, "accuracy_chance": 0.25,
    "questions": 240, "reload_max_rel_diff": 1e-6,
}  # fmt: skip


def test_good_figures_pass_every_check() -> None:
    assert all(check.passed for check in checks(PASSING_FIGURES, own_text=False))


@pytest.mark.parametrize(
    ("figure", "value", "rule"),
    [
        ("tokens_per_char_zh_after", 1.81, "tokens per Chinese character"),
        ("bits_per_byte_zh_base", 1.49, "at least 20 %"),
        ("bits_per_byte_zh_unexpanded", 1.2, "unexpanded"),
        ("bits_per_byte_en_cpt", 1.051, "at most 5 %"),
        ("accuracy_sft", 0.399, "15 points"),
        ("questions", 199, "200 questions"),
        ("reload_max_rel_diff", 2e-5, "reloaded"),
        ("reload_max_rel_diff", float("nan"), "reloaded"),
    ],
)
def test_each_figure_can_fail_its_check(figure: str, value: float, rule: str) -> None:
    failed = [check for check in checks(PASSING_FIGURES | {figure: value}, own_text=False) if not check.passed]
    assert len(failed) == 1
    assert rule in failed[0].rule


def test_own_text_needs_no_accuracy() -> None:
    assert all(check.passed for check in checks(PASSING_FIGURES | {"accuracy_sft": 0.2}, own_text=True))


def test_the_report_contains_every_stage_and_failure() -> None:
    rows = [
        {"loss": 3.0, "step": 1, "tokens": 10, "seconds": 1.0},
        {"loss": 2.0, "step": 2, "tokens": 20, "seconds": 1.0},
    ]
    stage = {"seconds": 2.5, "command": "python x"} | training(rows)
    failed_checks = [dataclasses.replace(check, passed=False) for check in checks(PASSING_FIGURES, own_text=False)]
    text = report({"train": stage}, PASSING_FIGURES, failed_checks)
    assert "| train | 2.5 | 3.000 -> 2.000 | 10 | `python x` |" in text
    assert text.count("FAILED") == len(failed_checks)
    assert table(PASSING_FIGURES) in text
