"""Submits the Slurm jobs of a run or a pipeline, all or none.

Writes each job's frozen configuration and batch script, queues the jobs and records them in `jobs.json`.
"""

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fireflyds.app import plain
from fireflyds.cluster import script, slurm
from fireflyds.cluster.script import Job
from fireflyds.config import ClusterConfig
from fireflyds.errors import UserError
from fireflyds.fs import atomic_write_text
from fireflyds.runs import layout

# Seconds within which the remaining ranks exit after a first one has exited, beyond training's own timeouts.
_WAIT_SECONDS = 180


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """A job and its frozen configuration, as YAML text."""

    job: Job
    config: str


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A queued job, as recorded in `jobs.json`."""

    name: str
    verb: str
    id: str
    folder: str
    script: str
    log: str
    time: float


def plan_job(verb: str, name: str, folder: Path, run_dir: Path | None, config: str, stamp: str = "") -> PlannedJob:
    """Returns the job of a run or of a pipeline stage.

    Args:
        folder: folder of the submitted run or pipeline.
        run_dir: folder of the training run; None for other verbs.
        stamp: text that the job writes to its `.done` file on success.
    """
    # A single training run keeps its configuration where training itself writes it.
    is_single_run = run_dir == folder
    config_path = folder / layout.CONFIG if is_single_run else folder / layout.JOBS_FOLDER / f"{name}.yaml"
    script_path = folder / layout.SUBMIT_SCRIPT if is_single_run else folder / layout.JOBS_FOLDER / f"{name}.sh"
    return PlannedJob(
        Job(name, verb, run_dir or folder, config_path, script_path, stamp, _wait_seconds(verb, config)), config
    )


def _wait_seconds(verb: str, config: str) -> int:
    """Returns the value of `srun --wait`: longer than training's own timeouts, which log the missing rank."""
    if verb != "train":
        return _WAIT_SECONDS
    config_values = plain(config)
    timeout: float = max(
        60 * config_values["hardware"]["start_timeout_minutes"], config_values["recovery"]["heartbeat_seconds"]
    )
    return math.ceil(timeout) + _WAIT_SECONDS


def read_job_records(folder: Path) -> list[JobRecord]:
    """Returns the recorded jobs of a run; empty before its first submission."""
    file = folder / layout.JOBS
    return [JobRecord(**record) for record in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []


def refuse_active(folder: Path) -> None:
    """Raises `UserError` if an earlier job of the same run is pending or running."""
    records = read_job_records(folder)
    states = slurm.states([record.id for record in records])
    active = [
        f"{record.name} (job {record.id}, {states[record.id].state})" for record in records if states[record.id].active
    ]
    if active:
        raise UserError(
            f"submitted already: {', '.join(active)}",
            key=folder,
            remedy="Wait, cancel it (`launch/submit.py action=cancel run=...`) or give another run=",
        )


def _refuse_unrecorded(planned: Sequence[PlannedJob], folder: Path) -> None:
    """Raises `UserError` if a job is queued that `jobs.json` lacks: its submission was killed before recording it."""
    recorded = [record.id for record in read_job_records(folder)]
    unknown = [job for job in slurm.queued(_scripts(planned)) if job not in recorded]
    if unknown:
        raise UserError(
            f"submitted already, as job {', '.join(unknown)}",
            key=folder,
            remedy=f"Wait for it, or `scancel {' '.join(unknown)}`",
        )


def submit(planned: Sequence[PlannedJob], cluster: ClusterConfig, folder: Path) -> list[JobRecord]:
    """Queues jobs, each of which starts after the previous one has succeeded.

    Raises:
        UserError: Slurm rejects a job. Then no job remains in the queue and all files are restored.
    """
    slurm.require()
    refuse_active(folder)
    _refuse_unrecorded(planned, folder)
    for planned_job in planned:
        slurm.try_out(script.text(planned_job.job, cluster))
    files = [*_files(planned), folder / layout.JOBS]
    original_texts = {path: path.read_text(encoding="utf-8") if path.exists() else None for path in files}
    queued: list[JobRecord] = []
    # SIGHUP (a dropped connection) and SIGTERM raise KeyboardInterrupt, as Ctrl-C does.
    with _handle_signals(signal.default_int_handler, signal.SIGHUP, signal.SIGTERM):
        try:
            write(planned, cluster)
            for planned_job in planned:
                _queue(planned_job.job, cluster, queued, folder)
        except BaseException as error:
            with _handle_signals(signal.SIG_IGN, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                _cancel_queued(planned, queued, error)
                for path, text in original_texts.items():
                    path.unlink(missing_ok=True) if text is None else atomic_write_text(path, text)
            raise
    return queued


def _cancel_queued(planned: Sequence[PlannedJob], queued: Sequence[JobRecord], error: BaseException) -> None:
    """Cancels the queued jobs, including one that Slurm accepted although its response was lost.

    Raises:
        UserError: the jobs cannot be cancelled; `jobs.json` then still lists them.
    """
    job_ids = [record.id for record in queued]
    try:
        slurm.cancel(job_ids)
        slurm.cancel(slurm.queued(_scripts(planned)))
    except UserError as cancel_error:
        if job_ids:
            raise UserError(
                f"{error}; cancelling the queued jobs failed as well ({cancel_error}): jobs {', '.join(job_ids)} may "
                "still be queued",
                remedy=f"`scancel {' '.join(job_ids)}` when Slurm answers again",
            ) from error


def _scripts(planned: Sequence[PlannedJob]) -> dict[str, Path]:
    return {planned_job.job.name: planned_job.job.script for planned_job in planned}


def write(planned: Sequence[PlannedJob], cluster: ClusterConfig) -> None:
    """Writes the frozen configurations and batch scripts, and removes exit codes of earlier jobs."""
    for planned_job in planned:
        for path in (planned_job.job.config, planned_job.job.script, planned_job.job.log):
            path.parent.mkdir(parents=True, exist_ok=True)
        planned_job.job.code.unlink(missing_ok=True)
        atomic_write_text(planned_job.job.config, planned_job.config)
        atomic_write_text(planned_job.job.script, script.text(planned_job.job, cluster))


def _files(planned: Sequence[PlannedJob]) -> list[Path]:
    return [path for planned_job in planned for path in (planned_job.job.config, planned_job.job.script)]


@contextlib.contextmanager
def _handle_signals(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Installs a handler for the signals within the context; no-op outside the main thread, where Python forbids it."""
    is_main_thread = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in numbers if is_main_thread}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _queue(job: Job, cluster: ClusterConfig, queued: list[JobRecord], folder: Path) -> None:
    """Queues a job, or its chain of jobs; records each at once, so that none is lost on an interruption."""
    dependency = f"afterok:{queued[-1].id}" if queued else ""
    for position in range(1, (cluster.chain if job.verb == "train" else 1) + 1):
        job_id = slurm.submit(job.script, position, dependency)
        name = job.name if position == 1 else f"{job.name} ({position})"
        log = str(job.log).replace("%j", job_id)
        queued.append(JobRecord(name, job.verb, job_id, str(job.folder), str(job.script), log, time.time()))
        atomic_write_text(folder / layout.JOBS, json.dumps([asdict(record) for record in queued], indent=2))
        dependency = f"afterany:{job_id}"
