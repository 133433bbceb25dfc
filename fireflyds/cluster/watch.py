"""Reads metrics, status and outcome of a trial from the files of its run."""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fireflyds.config import Direction, ObjectiveAt, SearchConfig
from fireflyds.errors import DivergedError, LostRankError
from fireflyds.runs import layout
from fireflyds.runs.jsonl import read_jsonl
from fireflyds.runs.layout import EXIT_STOPPED, FAILED, FINISHED, STOPPED

# Maximum number of values reported to the pruner per run: it compares few, and the study stores all of them.
_MAX_REPORTS = 200

# States of a run without processes, in addition to those of `status.json`.
INTERRUPTED, LOST, DIVERGED = "interrupted", "lost", "diverged"
# The state of a run that failed, by the kind of its error.
_STATES = {LostRankError.kind: LOST, DivergedError.kind: DIVERGED}


@dataclass(frozen=True, slots=True)
class RunOutcome:
    """How a run ended."""

    state: str
    """`finished`, `stopped` (by a STOP file), `failed` or `diverged`; resumable: `interrupted` (by a signal) or `lost`
    (no outcome was recorded, or a rank was lost)."""
    message: str = ""


def metric_history(run_dir: Path, metric: str) -> list[tuple[int, float, int]]:
    """Returns (step, value, trained tokens) of every measurement of the metric; NaN where the value is not a number."""
    tokens: dict[int, int] = {}
    history = []
    for row in read_jsonl(run_dir / layout.METRICS):
        tokens[row["step"]] = row["tokens"]
        if metric in row:
            history.append((row["step"], _number(row[metric]), row["tokens"]))
    validated = [row for row in read_jsonl(run_dir / layout.VALIDATION) if metric in row and row["step"] in tokens]
    history += [(row["step"], _number(row[metric]), tokens[row["step"]]) for row in validated]
    return history


def metric_names(run_dir: Path) -> list[str]:
    """Returns the names of all metrics that a run has logged."""
    return sorted(
        {key for name in ("metrics", "validation") for row in read_jsonl(run_dir / f"{name}.jsonl") for key in row}
    )


def pruner_reports(run_dir: Path, search: SearchConfig) -> dict[int, float]:
    """Returns the values for the pruner by step; the same steps in every trial, so that they are comparable."""
    total = read_status(run_dir).get("total_steps", 0)
    every = max(1, math.ceil(total / _MAX_REPORTS))
    history = metric_history(run_dir, search.metric)
    return {
        step: value
        for step, value, _ in history
        if step and (step % every == 0 or "validation" in search.metric) and math.isfinite(value)
    }


def objective_value(run_dir: Path, search: SearchConfig) -> float | None:
    """Returns the objective's value of a run; None if it was not measured, NaN if it is not a number."""
    history = metric_history(run_dir, search.metric)
    if search.value is ObjectiveAt.at_tokens:
        history = [entry for entry in history if entry[2] >= (search.tokens or 0)][:1]
    if not history:
        return None
    if search.value is ObjectiveAt.best:
        numbers = [value for _, value, _ in history if math.isfinite(value)]
        return (min if search.direction is Direction.min else max)(numbers, default=math.nan)
    return history[-1][1]


def read_status(run_dir: Path) -> dict[str, Any]:
    """Returns the contents of the run's `status.json`; empty before it exists."""
    file = run_dir / layout.STATUS
    return json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}


def run_outcome(run_dir: Path) -> RunOutcome:
    """Returns the outcome of a run whose processes have exited."""
    run_status = read_status(run_dir)
    state, message = run_status.get("state"), run_status.get("message", "")
    if state == FAILED:
        return RunOutcome(_STATES.get(run_status["kind"], FAILED), message)
    if state == FINISHED or (state == STOPPED and run_status["exit_code"] == EXIT_STOPPED):
        return RunOutcome(str(state), message)
    if state == STOPPED:
        return RunOutcome(INTERRUPTED, message)
    if not run_status and (error_line := _error_line(run_dir)):
        return RunOutcome(FAILED, error_line)
    return RunOutcome(LOST, _last_line(run_dir))


def archive_output(run_dir: Path) -> None:
    """Removes `status.json` and renames the logs of a failed start, so that they do not affect the next outcome."""
    (run_dir / layout.STATUS).unlink(missing_ok=True)
    for file in [run_dir / layout.LAUNCHER_LOG, *(run_dir / layout.LOGS).glob("slurm-*.log")]:
        if file.exists():
            file.rename(file.with_suffix(".refused"))


def training_totals(run_dir: Path) -> tuple[int, int, float]:
    """Returns the steps, tokens and seconds of training."""
    rows = list(read_jsonl(run_dir / layout.METRICS))
    return (rows[-1]["step"], rows[-1]["tokens"], sum(row["seconds"] for row in rows)) if rows else (0, 0, 0.0)


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)


def _output(run_dir: Path) -> list[str]:
    """Returns the lines of the newest log of the run's launcher or jobs."""
    files = sorted(
        [run_dir / layout.LAUNCHER_LOG, *(run_dir / layout.LOGS).glob("slurm-*.log")],
        key=lambda file: file.stat().st_mtime if file.exists() else 0,
    )
    return files[-1].read_text(encoding="utf-8", errors="replace").splitlines() if files[-1].exists() else []


def _error_line(run_dir: Path) -> str:
    """Returns the last `error: ` line, why the run was rejected before training; empty if there is none."""
    return next((line for line in reversed(_output(run_dir)) if line.startswith("error: ")), "")


def _last_line(run_dir: Path) -> str:
    return next((line for line in reversed(_output(run_dir)) if line.strip()), "no output")
