"""Results are appended with their options and versions, and a limited one does not count as complete."""

from pathlib import Path

import pytest

from fireflyds.errors import UserError
from fireflyds.evaluation.results import EvaluationResult, append_result, latest_figures, read_results, versions


def result(task: str, figure: float, *, complete: bool = True, **options) -> EvaluationResult:
    return EvaluationResult(
        task, "model", "protocol", "source", {"accuracy": figure}, options, complete, "hash", versions()
    )


def test_a_second_evaluation_keeps_the_results_of_the_first(tmp_path: Path) -> None:
    append_result(tmp_path, result("bits_per_byte", 1.5))
    append_result(tmp_path, result("cmmlu", 0.5, num_shots=5))
    append_result(tmp_path, result("cmmlu", 0.6, num_shots=0))
    assert [(entry.task, entry.figures["accuracy"]) for entry in read_results(tmp_path)] == [
        ("bits_per_byte", 1.5),
        ("cmmlu", 0.5),
        ("cmmlu", 0.6),
    ]
    assert latest_figures(tmp_path, "cmmlu") == {"accuracy": 0.6}
    assert {"fireflyds", "torch", "transformers"} <= read_results(tmp_path)[0].versions.keys()


def test_a_limited_result_does_not_count_as_complete(tmp_path: Path) -> None:
    append_result(tmp_path, result("cmmlu", 0.9, complete=False, limit=10))
    with pytest.raises(UserError, match="no complete result of cmmlu"):
        latest_figures(tmp_path, "cmmlu")
    append_result(tmp_path, result("cmmlu", 0.4))
    append_result(tmp_path, result("cmmlu", 0.9, complete=False, limit=10))
    assert latest_figures(tmp_path, "cmmlu") == {"accuracy": 0.4}


@pytest.mark.parametrize("text", ["{half", "[]", '{"scores": {}}', '{"results": [{"task": "x"}]}'])
def test_an_invalid_scores_file_is_refused_and_unchanged(tmp_path: Path, text: str) -> None:
    (tmp_path / "scores.json").write_text(text)
    with pytest.raises(UserError, match=r"scores\.json"):
        append_result(tmp_path, result("cmmlu", 0.4))
    assert (tmp_path / "scores.json").read_text() == text
