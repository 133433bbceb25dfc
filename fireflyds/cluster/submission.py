"""Jobs of a run or of a road: frozen, written, queued all or none, and remembered in `jobs.json`."""

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

RECORDS = "jobs.json"
# Ranks that have nobody to wait for leave within this time after one has left.
_WAIT_SECONDS = 180


@dataclass(frozen=True, slots=True)
class PlannedJob:
    """A job and the configuration that it is to find, as YAML."""

    job: Job
    config: str


@dataclass(frozen=True, slots=True)
class JobRecord:
    """A job that was queued."""

    name: str
    verb: str
    id: str
    folder: str
    script: str
    log: str
    time: float


def plan_job(verb: str, name: str, folder: Path, run_dir: Path | None, config: str, stamp: str = "") -> PlannedJob:
    """The job of a stage `name`; `folder` is that of what was submitted, `run_dir` that of a training run."""
    # A training run has its configuration where training itself writes it.
    alone = run_dir == folder
    place = folder / "config.yaml" if alone else folder / "jobs" / f"{name}.yaml"
    path = folder / "submit.sh" if alone else folder / "jobs" / f"{name}.sh"
    return PlannedJob(Job(name, verb, run_dir or folder, place, path, stamp, _wait_seconds(verb, config)), config)


def _wait_seconds(verb: str, config: str) -> int:
    """Ranks of a training notice by themselves, and say, that another did not come or is lost; then they leave."""
    if verb != "train":
        return _WAIT_SECONDS
    found = plain(config)
    patience: float = max(60 * found["hardware"]["start_timeout_minutes"], found["recovery"]["heartbeat_seconds"])
    return math.ceil(patience) + _WAIT_SECONDS


def read_job_records(folder: Path) -> list[JobRecord]:
    """What was queued for a run before."""
    file = folder / RECORDS
    return [JobRecord(**record) for record in json.loads(file.read_text(encoding="utf-8"))] if file.exists() else []


def refuse_active(folder: Path) -> None:
    """Raises `UserError` where an earlier job of the same run waits or runs."""
    before = read_job_records(folder)
    states = slurm.states([record.id for record in before])
    active = [
        f"{record.name} (job {record.id}, {states[record.id].state})" for record in before if states[record.id].active
    ]
    if active:
        raise UserError(
            f"{folder}: submitted already: {', '.join(active)}. Wait for it, `launch/submit.py action=cancel run=...`, or give another run="
        )


def _refuse_unknown(planned: Sequence[PlannedJob], folder: Path) -> None:
    """Whoever queued a job may have been killed before its number was noted."""
    noted = [record.id for record in read_job_records(folder)]
    unknown = [job for job in slurm.queued(_scripts(planned)) if job not in noted]
    if unknown:
        raise UserError(
            f"{folder}: submitted already, as job {', '.join(unknown)}. Wait for it, or `scancel {' '.join(unknown)}`"
        )


def submit(planned: Sequence[PlannedJob], cluster: ClusterConfig, folder: Path) -> list[JobRecord]:
    """Queue jobs, each after the one before has done its work.

    Raises:
        UserError: a job is refused. Then none is left in the queue, and files are as before.
    """
    slurm.require()
    refuse_active(folder)
    _refuse_unknown(planned, folder)
    for each in planned:
        slurm.try_out(script.text(each.job, cluster))
    files = [*_files(planned), folder / RECORDS]
    old = {path: path.read_text(encoding="utf-8") if path.exists() else None for path in files}
    queued: list[JobRecord] = []
    # A connection that drops in the middle is a Ctrl-C.
    with _signals(signal.default_int_handler, signal.SIGHUP, signal.SIGTERM):
        try:
            write(planned, cluster)
            for each in planned:
                _queue(each.job, cluster, queued, folder)
        except BaseException as error:
            with _signals(signal.SIG_IGN, signal.SIGHUP, signal.SIGTERM, signal.SIGINT):
                _take_back(planned, queued, error)
                for path, text in old.items():
                    path.unlink(missing_ok=True) if text is None else atomic_write_text(path, text)
            raise
    return queued


def _take_back(planned: Sequence[PlannedJob], queued: Sequence[JobRecord], error: BaseException) -> None:
    """Also a job that Slurm has taken while its answer was lost. A job that cannot be taken back stays known."""
    jobs = [record.id for record in queued]
    try:
        slurm.cancel(jobs)
        slurm.cancel(slurm.queued(_scripts(planned)))
    except UserError as trouble:
        if jobs:
            left = f"jobs {', '.join(jobs)} may still be queued: `scancel {' '.join(jobs)}` when Slurm answers again"
            raise UserError(f"{error}. And they could not be taken back ({trouble}): {left}") from error


def _scripts(planned: Sequence[PlannedJob]) -> dict[str, Path]:
    return {each.job.name: each.job.script for each in planned}


def write(planned: Sequence[PlannedJob], cluster: ClusterConfig) -> None:
    """The frozen configurations and the scripts."""
    for each in planned:
        for path in (each.job.config, each.job.script, each.job.log):
            path.parent.mkdir(parents=True, exist_ok=True)
        each.job.code.unlink(missing_ok=True)
        atomic_write_text(each.job.config, each.config)
        atomic_write_text(each.job.script, script.text(each.job, cluster))


def _files(planned: Sequence[PlannedJob]) -> list[Path]:
    return [path for each in planned for path in (each.job.config, each.job.script)]


@contextlib.contextmanager
def _signals(handler: Any, *numbers: signal.Signals) -> Iterator[None]:
    """Handle some signals otherwise; Python allows it in the main thread only."""
    mine = threading.current_thread() is threading.main_thread()
    previous = {number: signal.signal(number, handler) for number in numbers if mine}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _queue(job: Job, cluster: ClusterConfig, queued: list[JobRecord], folder: Path) -> None:
    """One job, or a chain of them; each is noted at once, so that whatever happens finds all."""
    after = f"afterok:{queued[-1].id}" if queued else ""
    for place in range(1, (cluster.chain if job.verb == "train" else 1) + 1):
        number = slurm.submit(job.script, place, after)
        name = job.name if place == 1 else f"{job.name} ({place})"
        log = str(job.log).replace("%j", number)
        queued.append(JobRecord(name, job.verb, number, str(job.folder), str(job.script), log, time.time()))
        atomic_write_text(folder / RECORDS, json.dumps([asdict(record) for record in queued], indent=2))
        after = f"afterany:{number}"
