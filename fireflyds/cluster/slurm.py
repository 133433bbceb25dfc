"""Wrappers of Slurm's commands, with remedies for their errors."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fireflyds.errors import UserError

# Timeout of a command in seconds: sbatch retries while the queue is full or the controller is unreachable.
_PATIENCE = 60.0
_UNREACHABLE = "Unable to contact|Connection refused|connect failure|timed out"
_UNREACHABLE_REMEDY = "The controller does not respond: check `scontrol ping` and SLURM_CONF"
_QUEUE_FULL = "queue is full|temporarily unable to accept|MaxSubmit"
# Pattern of Slurm's error text, and the remedy with the key to change.
_REMEDIES = (
    (
        "Max\\w*(Wall|PerJob)|Max(Wall|Node|Cpu|Gres)\\w*Limit",
        "The limit of a single job is exceeded: give a shorter cluster.time or fewer cluster.nodes; `sacctmgr show "
        "qos,associations` shows the limits",
    ),
    (
        f"{_QUEUE_FULL}|QOSMax|AssocMax|AssocGrp|QOSGrp",
        "The queue accepts no more of your jobs; wait until some have ended, or give another cluster.qos or "
        "cluster.account",
    ),
    ("account", "Give cluster.account=<one of yours>; `sacctmgr show associations user=$USER` lists them"),
    ("partition", "Give cluster.partition=<one of `sinfo`>"),
    ("qos", "Give cluster.qos=<one of `sacctmgr show qos`>"),
    ("time limit", "Give a shorter cluster.time; `sinfo` shows the limit of each partition"),
    ("feature|constraint", "Give another cluster.constraint; `sinfo -o '%n %f'` lists the features of nodes"),
    (
        "gres|generic resource",
        "This cluster has another name for its GPUs: see `sinfo -o '%n %G'`, give cluster.sbatch=--gres=gpu:8 or "
        "cluster.gpu=cpu",
    ),
    (
        "node configuration|node count|Memory|CPU count",
        "No node has the requested resources: compare cluster.nodes, gpus_per_node, cpus_per_task and memory with "
        "`sinfo -o '%n %c %m %G'`",
    ),
    (_UNREACHABLE, _UNREACHABLE_REMEDY),
    ("unrecognized option|invalid option", "This version of Slurm does not have the option: check cluster.sbatch"),
)

_TERMINAL_STATES = (
    "gone",
    "COMPLETED",
    "FAILED",
    "CANCELLED",
    "TIMEOUT",
    "NODE_FAIL",
    "PREEMPTED",
    "BOOT_FAIL",
    "DEADLINE",
    "OUT_OF_MEMORY",
    "REVOKED",
)
# Variables of a job or launcher around this process: the new job would inherit them and its ranks would use them.
_REMOVED_PREFIXES = ("SLURM_", "SRUN_", "SBATCH_", "PMI", "OMPI_")
_KEPT_VARIABLES = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_RANK_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_SIZE",
    "LOCAL_WORLD_SIZE",
    "CROSS_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


class UnavailableError(UserError):
    """Slurm does not respond, or accepts no more jobs at present; a retry may succeed."""


@dataclass(frozen=True, slots=True)
class JobState:
    """The state of a job as reported by Slurm."""

    state: str
    """Slurm's state, such as PENDING, RUNNING, COMPLETED; `gone` if Slurm no longer has a record of the job."""
    reason: str = ""
    elapsed: str = ""
    nodes: str = ""

    @property
    def active(self) -> bool:
        """True unless Slurm reports a terminal state."""
        return self.state not in _TERMINAL_STATES


def require() -> None:
    """Raises `UserError` if sbatch is not on the path."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "there is no sbatch on the path",
            key="cluster.scheduler",
            value="slurm",
            remedy="Submit from a login node (`module load slurm`?), or give dry_run=true to write the script "
            "without submitting it",
        )


def try_out(script: str) -> None:
    """Validates a script, given as text, with `sbatch --test-only`; queues nothing.

    Raises:
        UserError: Slurm would reject it.
    """
    result = _run(["sbatch", "--test-only"], script)
    # Slurm reports this also while nodes are down or drained; the job then waits for them.
    if "node configuration is not available" in result.stderr and _has_unavailable_nodes(script):
        return
    if result.returncode:
        raise _rejected(result.stderr)


def _has_unavailable_nodes(script: str) -> bool:
    """True where some nodes of the script's partition are unavailable at present."""
    partition = re.search(r"^#SBATCH --partition=(\S+)$", script, re.MULTILINE)
    options = [f"--partition={partition[1]}"] if partition else []
    result = _run(["sinfo", "--noheader", "--Node", *options, "--format=%t"])
    return any(not re.match("idle|mix|alloc|comp|plnd", state) for state in result.stdout.split())


def submit(script: Path, position: int = 1, after: str = "") -> str:
    """Queues a script and returns the job's ID.

    Args:
        position: the script's argument, its position in a chain of jobs, from 1.
        after: a dependency, such as `afterok:12`; empty for none.

    Raises:
        UserError: Slurm rejects the job or does not respond.
    """
    # Otherwise a job whose dependency can no longer be satisfied stays pending for ever.
    dependency = [f"--dependency={after}", "--kill-on-invalid-dep=yes"] if after else []
    result = _run(["sbatch", "--parsable", *dependency, str(script.absolute()), str(position)])
    if result.returncode:
        raise _rejected(result.stderr)
    return result.stdout.strip().split(";")[0]


def states(jobs: Sequence[str]) -> dict[str, JobState]:
    """Returns the state of each job, by ID.

    Raises:
        UserError: Slurm does not respond.
    """
    job_states = dict.fromkeys(jobs, JobState("gone"))
    for job in jobs:
        # Not squeue: it fails for all jobs if it has no record of one of them.
        result = _run(["scontrol", "--oneliner", "show", "job", job])
        if result.returncode and "Invalid job id" not in result.stderr:
            raise _slurm_error(f"scontrol show job {job}", result.stderr)
        fields = dict(re.findall(r"(\w+)=(\S*)", result.stdout))
        if "JobState" in fields:
            reason = "" if fields.get("Reason") == "None" else fields.get("Reason", "")
            nodes = "" if fields.get("NodeList") == "(null)" else fields.get("NodeList", "")
            job_states[job] = JobState(fields["JobState"], reason, fields.get("RunTime", ""), nodes)
    return job_states


def queued(scripts: Mapping[str, Path]) -> list[str]:
    """Returns the IDs of queued jobs that have one of the names and run its script."""
    result = _run(["squeue", "--noheader", f"--name={','.join(scripts)}", "--format=%i %o"])
    if result.returncode:
        raise _slurm_error("squeue", result.stderr)
    paths = [str(script.absolute()) for script in scripts.values()]
    lines = [line.partition(" ") for line in result.stdout.splitlines()]
    return [
        job for job, _, command in lines if any(command == path or command.startswith(f"{path} ") for path in paths)
    ]


def cancel(jobs: Sequence[str]) -> None:
    """Cancels jobs: pending ones at once; running ones receive SIGTERM first, on which training saves a checkpoint."""
    if jobs:
        result = _run(["scancel", *jobs])
        if result.returncode:
            raise _slurm_error(f"scancel {' '.join(jobs)}", result.stderr)


def _run(command: list[str], stdin: str = "") -> "subprocess.CompletedProcess[str]":
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _KEPT_VARIABLES or not (name.startswith(_REMOVED_PREFIXES) or name in _RANK_VARIABLES)
    }
    try:
        return subprocess.run(
            command, env=environment, input=stdin, capture_output=True, text=True, errors="replace", timeout=_PATIENCE
        )
    except FileNotFoundError as error:
        raise UserError(
            "not on the path", key=command[0], remedy="Slurm's commands are available on login nodes"
        ) from error
    except subprocess.TimeoutExpired as error:
        stderr = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
        message = _one_line(stderr)
        raise UnavailableError(
            f"{command[0]}: no answer within {_PATIENCE:.0f} s{f' ({message})' if message else ''}",
            remedy=_remedy(message, _UNREACHABLE_REMEDY),
        ) from error


def _rejected(stderr: str) -> UserError:
    return _slurm_error("sbatch rejected the job", stderr, "Check the #SBATCH options of the script and `sinfo`")


def _slurm_error(
    action: str, stderr: str, other_remedy: str = "Check `scontrol ping`, and run the command again"
) -> UserError:
    """Returns an `UnavailableError` where a retry may succeed, otherwise a `UserError`.

    Args:
        other_remedy: the remedy where Slurm's error text is not a known one.
    """
    error_type = UnavailableError if re.search(f"{_UNREACHABLE}|{_QUEUE_FULL}", stderr, re.IGNORECASE) else UserError
    message = _one_line(stderr)
    return error_type(f"{action}: {message or 'no error text'}", remedy=_remedy(message, other_remedy))


def _one_line(stderr: str) -> str:
    """Returns Slurm's error text in one line."""
    lines = dict.fromkeys(re.sub(r"^(s\w+: )?(error: )?", "", line.strip()) for line in stderr.splitlines())
    return "; ".join(line for line in lines if line).rstrip(".")


def _remedy(message: str, other: str) -> str:
    """Returns the remedy for Slurm's error text, or `other` where none is known."""
    return next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, message, re.IGNORECASE)), other)
