"""How what was submitted stands, for a person."""

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from fireflyds.cluster.script import code_file
from fireflyds.cluster.slurm import JobState
from fireflyds.cluster.submission import JobRecord

# Why a job waits, in other words than Slurm's.
_REASONS = {
    "Resources": "waits for free nodes",
    "Priority": "others come first",
    "Dependency": "waits for the job before",
    "DependencyNeverSatisfied": "the job before failed",
    "BeginTime": "was put back, starts again soon",
    "PartitionTimeLimit": "asks for more time than the partition gives: it will never start. Cancel it, give a shorter cluster.time",
    "PartitionNodeLimit": "asks for more nodes than the partition gives: it will never start. Cancel it, give another cluster.partition",
    "ReqNodeNotAvail": "the nodes are down, reserved or draining",
    "Nodes_required_for_job_are_DOWN,_DRAINED_or_reserved_for_jobs_in_higher_priority_partitions": "waits for nodes that are down or drained",
    "JobHeldUser": "is held: scontrol release",
    "JobHeldAdmin": "is held by an administrator",
    "launch_failed_requeued_held": "could not be started on its node and is held: look at the log, then scontrol release",
}
_TAIL = 1 << 16


def status(records: Sequence[JobRecord], states: Mapping[str, JobState]) -> str:
    """One line a job, and where a training run stands."""
    lines = []
    for record in records:
        state = states[record.id]
        about = [f"{record.name}: job {record.id} {state.state}"]
        if state.nodes:
            about.append(f"on {state.nodes} for {state.elapsed}")
        if state.reason and state.state == "PENDING":
            about.append(f"{_REASONS[state.reason]} ({state.reason})" if state.reason in _REASONS else state.reason)
        if state.state == "gone":
            about.append("no longer known to Slurm")
        code = code_file(Path(record.script))
        if not state.active and code.exists():
            about.append(f"left with {code.read_text(encoding='utf-8').strip()}")
        if record.verb == "train":
            about += _progress(Path(record.folder))
        lines.append("; ".join(about))
    return "\n".join(lines)


def _progress(folder: Path) -> list[str]:
    file = folder / "status.json"
    if not file.exists():
        return ["has not begun to train"]
    found = json.loads(file.read_text(encoding="utf-8"))
    ago = time.time() - file.stat().st_mtime
    step = found["step"]
    rows = _last_lines(folder / "metrics.jsonl", 1)
    if rows and found["state"] == "running":
        row = json.loads(rows[0])
        step, ago = row["step"], time.time() - (folder / "metrics.jsonl").stat().st_mtime
    said = [f"run is {found['state']} at step {step} of {found['total_steps']}, {ago:.0f} s ago"]
    return said + ([found["message"]] if found["message"] else [])


def logs(records: Sequence[JobRecord], lines: int) -> str:
    """The last lines of each job's output."""
    parts = []
    for record in records:
        path = Path(record.log)
        text = "\n".join(_last_lines(path, lines)) if path.exists() else "nothing yet"
        parts.append(f"== {record.name}, job {record.id}: {path}\n{text}")
    return "\n".join(parts)


def _last_lines(path: Path, count: int) -> list[str]:
    """Whole lines from the end of a file that may be large and is being written."""
    if not path.exists():
        return []
    with path.open("rb") as stream:
        stream.seek(max(0, path.stat().st_size - _TAIL))
        text = stream.read().decode("utf-8", errors="replace")
    return text[: text.rfind("\n") + 1].splitlines()[-count:]
