"""What a trial's run says of itself while it trains, and when it has ended."""

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fireflyds.cluster.launchers import LOG
from fireflyds.config import Direction, ObjectiveAt, SearchConfig

STOP = "STOP"
# Of a long run so many values are reported at most: a pruner compares few, and a study keeps them all.
_REPORTS = 200


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a run ended."""

    state: str
    """`finished`, `stopped` (by a file), `failed`, `diverged`; or it can go on: `left` as asked, `died` without a word."""
    message: str = ""


def metric_history(run_dir: Path, metric: str) -> list[tuple[int, float, int]]:
    """Step, value and trained tokens, wherever the metric was measured; NaN where it was no number."""
    tokens: dict[int, int] = {}
    found = []
    for row in _rows(run_dir / "metrics.jsonl"):
        tokens[row["step"]] = row["tokens"]
        if metric in row:
            found.append((row["step"], _number(row[metric]), row["tokens"]))
    validated = [row for row in _rows(run_dir / "validation.jsonl") if metric in row and row["step"] in tokens]
    found += [(row["step"], _number(row[metric]), tokens[row["step"]]) for row in validated]
    return found


def metric_names(run_dir: Path) -> list[str]:
    """The metrics that a run has measured."""
    return sorted(
        {key for name in ("metrics", "validation") for row in _rows(run_dir / f"{name}.jsonl") for key in row}
    )


def pruner_reports(run_dir: Path, search: SearchConfig) -> dict[int, float]:
    """Values to compare with other trials, by step: the same steps in each."""
    total = read_status(run_dir).get("total_steps", 0)
    every = max(1, math.ceil(total / _REPORTS))
    found = metric_history(run_dir, search.metric)
    return {
        step: value
        for step, value, _ in found
        if step and (step % every == 0 or "validation" in search.metric) and math.isfinite(value)
    }


def objective_value(run_dir: Path, search: SearchConfig) -> float | None:
    """What counts of a run; None where it was not measured, NaN where it was no number."""
    found = metric_history(run_dir, search.metric)
    if search.value is ObjectiveAt.at_tokens:
        found = [one for one in found if one[2] >= (search.tokens or 0)][:1]
    if not found:
        return None
    if search.value is ObjectiveAt.best:
        numbers = [one for _, one, _ in found if math.isfinite(one)]
        return (min if search.direction is Direction.min else max)(numbers, default=math.nan)
    return found[-1][1]


def read_status(run_dir: Path) -> dict[str, Any]:
    """The run's `status.json`; empty before there is one."""
    file = run_dir / "status.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def run_outcome(run_dir: Path) -> RunOutcome:
    """How a run ended whose processes are gone."""
    found = read_status(run_dir)
    state, message = found.get("state"), found.get("message", "")
    if state == "failed" and found.get("lost"):
        return RunOutcome("lost", message)
    if state == "failed":
        return RunOutcome(
            "diverged" if "recovery.max_skipped" in message or "recovery.max_rollbacks" in message else "failed",
            message,
        )
    if state == "finished" or (state == "stopped" and found["exit_code"] == 76):
        return RunOutcome(str(state), message)
    if state == "stopped":
        return RunOutcome("interrupted", message)
    if not found and (refusal := _error_line(run_dir)):
        return RunOutcome("failed", refusal)
    return RunOutcome("lost", _last_line(run_dir))


def archive_output(run_dir: Path) -> None:
    """Set aside what a start has said, so that the next one is judged by its own words."""
    (run_dir / "status.json").unlink(missing_ok=True)
    for file in [run_dir / LOG, *(run_dir / "logs").glob("slurm-*.log")]:
        if file.exists():
            file.rename(file.with_suffix(".refused"))


def training_totals(run_dir: Path) -> tuple[int, int, float]:
    """Steps, tokens and seconds of training."""
    rows = list(_rows(run_dir / "metrics.jsonl"))
    return (rows[-1]["step"], rows[-1]["tokens"], sum(row["seconds"] for row in rows)) if rows else (0, 0, 0.0)


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
            if line.endswith("\n"):
                yield json.loads(line)


def _number(found: Any) -> float:
    return math.nan if found is None else float(found)


def _output(run_dir: Path) -> list[str]:
    """What its launcher or its jobs wrote, the newest last."""
    files = sorted(
        [run_dir / LOG, *(run_dir / "logs").glob("slurm-*.log")],
        key=lambda file: file.stat().st_mtime if file.exists() else 0,
    )
    return files[-1].read_text(encoding="utf-8", errors="replace").splitlines() if files[-1].exists() else []


def _error_line(run_dir: Path) -> str:
    """The message of a run that was refused before it began."""
    return next((line for line in reversed(_output(run_dir)) if line.startswith("error: ")), "")


def _last_line(run_dir: Path) -> str:
    return next((line for line in reversed(_output(run_dir)) if line.strip()), "no output")
