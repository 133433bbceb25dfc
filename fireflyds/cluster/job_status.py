"""Human-readable status and logs of submitted jobs."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fireflyds.cluster.script import code_file
from fireflyds.cluster.slurm import JobState
from fireflyds.cluster.submission import JobRecord
from fireflyds.runs import layout

# Explanations of Slurm's reasons for a pending job.
_REASONS = {
    "Resources": "waits for free nodes",
    "Priority": "jobs of higher priority come first",
    "Dependency": "waits for the previous job",
    "DependencyNeverSatisfied": "the previous job failed",
    "BeginTime": "was requeued, starts again soon",
    "PartitionTimeLimit": (
        "requests more time than the partition allows: it will never start. Cancel it, give a shorter cluster.time"
    ),
    "PartitionNodeLimit": (
        "requests more nodes than the partition allows: it will never start. Cancel it, give another cluster.partition"
    ),
    "ReqNodeNotAvail": "the nodes are down, reserved or draining",
    "Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for_jobs_in_higher_priority_partitions": (
        "waits for nodes that are down or drained"
    ),
    "JobHeldUser": "is held: release it with `scontrol release`",
    "JobHeldAdmin": "is held by an administrator",
    "launch_failed_requeued_held": (
        "could not be started on its node and is held: check the log, then `scontrol release`"
    ),
}
_TAIL_BYTES = 1 << 16


def status(records: Sequence[JobRecord], states: Mapping[str, JobState]) -> str:
    """Returns one line per job: its Slurm state and, for training, the progress of the run."""
    lines = []
    for record in records:
        state = states[record.id]
        details = [f"{record.name}: job {record.id} {state.state}"]
        if state.nodes:
            details.append(f"on {state.nodes} for {state.elapsed}")
        if state.reason and state.state == "PENDING":
            details.append(f"{_REASONS[state.reason]} ({state.reason})" if state.reason in _REASONS else state.reason)
        if state.state == "gone":
            details.append("no longer known to Slurm")
        exit_code_file = code_file(Path(record.script))
        if not state.active and exit_code_file.exists():
            details.append(f"exited with code {exit_code_file.read_text(encoding='utf-8').strip()}")
        if record.verb == "train":
            details += _progress(Path(record.folder))
        lines.append("; ".join(details))
    return "\n".join(lines)


def _progress(folder: Path) -> list[str]:
    """Returns the state and step of a run and the age of its last update, from `status.json` and `metrics.jsonl`."""
    file = folder / layout.STATUS
    if not file.exists():
        return ["training has not started"]
    run_status = json.loads(file.read_text(encoding="utf-8"))
    age = time.time() - file.stat().st_mtime
    step = run_status["step"]
    rows = _last_lines(folder / layout.METRICS, 1)
    if rows and run_status["state"] == layout.RUNNING:
        row = json.loads(rows[0])
        step, age = row["step"], time.time() - (folder / layout.METRICS).stat().st_mtime
    details = [f"run is {run_status['state']} at step {step} of {run_status['total_steps']}, {age:.0f} s ago"]
    return details + ([run_status["message"]] if run_status["message"] else [])


def logs(records: Sequence[JobRecord], lines: int) -> str:
    """Returns the last lines of each job's log."""
    parts = []
    for record in records:
        path = Path(record.log)
        text = "\n".join(_last_lines(path, lines)) if path.exists() else "no output yet"
        parts.append(f"== {record.name}, job {record.id}: {path}\n{text}")
    return "\n".join(parts)


def _last_lines(path: Path, count: int) -> list[str]:
    """Returns the last complete lines of a file that may be large and may still be written to."""
    if not path.exists():
        return []
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        text = stream.read().decode("utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()[-count:]
