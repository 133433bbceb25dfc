"""Slurm's commands, and what to do when they refuse."""

import os
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from fireflyds.errors import UserError

# A controller whose queue is full lets sbatch knock again and again; one that is away takes as long to be noticed.
_PATIENCE = 60.0
_AWAY = "Unable to contact|Connection refused|connect failure|timed out"
_FULL = "queue is full|temporarily unable to accept|MaxSubmit"
# What Slurm says, and which key it is about.
_REMEDIES = (
    ("Max\\w*(Wall|PerJob)|Max(Wall|Node|Cpu|Gres)\\w*Limit", "one job may not have as much: give a shorter cluster.time or fewer cluster.nodes; `sacctmgr show qos,associations` shows the limits"),
    (f"{_FULL}|QOSMax|AssocMax|AssocGrp|QOSGrp", "the queue takes no more of your jobs; wait until some have ended, or give another cluster.qos or cluster.account"),
    ("account", "give cluster.account=<one of yours>; `sacctmgr show associations user=$USER` lists them"),
    ("partition", "give cluster.partition=<one of `sinfo`>"),
    ("qos", "give cluster.qos=<one of `sacctmgr show qos`>"),
    ("time limit", "give a shorter cluster.time; `sinfo` shows the limit of each partition"),
    ("feature|constraint", "give another cluster.constraint; `sinfo -o '%n %f'` lists the features of nodes"),
    ("gres|generic resource", "this cluster counts its GPUs under another name: look at `sinfo -o '%n %G'`, give cluster.sbatch=--gres=gpu:8 or cluster.gpu=cpu"),
    ("node configuration|node count|Memory|CPU count", "no node has what is asked: compare cluster.nodes, gpus_per_node, cpus_per_task and memory with `sinfo -o '%n %c %m %G'`"),
    (_AWAY, "the controller does not answer: `scontrol ping`, or SLURM_CONF names another cluster"),
    ("unrecognized option|invalid option", "this Slurm does not know the option: look at cluster.sbatch"),
)  # fmt: skip

_ENDED = (
    "gone", "COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED", "BOOT_FAIL", "DEADLINE", "OUT_OF_MEMORY", "REVOKED",
)  # fmt: skip
# Of a job or a launcher that this process may stand in itself: they would reach the new job, and its ranks believe them.
_NOT_PASSED = ("SLURM_", "SRUN_", "SBATCH_", "PMI", "OMPI_")
_PASSED = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT")
_OF_RANKS = (
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
    """Slurm does not answer, or takes no more jobs for now: the same may go well later."""


@dataclass(frozen=True, slots=True)
class JobState:
    """How a job stands."""

    state: str
    """Slurm's word, such as PENDING, RUNNING, COMPLETED; `gone` when Slurm has forgotten it."""
    reason: str = ""
    elapsed: str = ""
    nodes: str = ""

    @property
    def active(self) -> bool:
        return self.state not in _ENDED


def require() -> None:
    """Raises `UserError` where there is no Slurm."""
    if shutil.which("sbatch") is None:
        raise UserError(
            "cluster.scheduler=slurm: there is no sbatch on the path. Submit from a login node (`module load slurm`?), or "
            "give dry_run=true to write the script and take it there"
        )


def try_out(script: str) -> None:
    """Let Slurm say, without queueing anything, whether it would take a script, given as text.

    Raises:
        UserError: it would not.
    """
    try:
        _sbatch("--test-only", text=script)
    except UserError as error:
        # Said also where nodes are down or drained for now: then the job waits for them.
        if "node configuration is not available" not in str(error) or not _nodes_away(script):
            raise


def _nodes_away(script: str) -> bool:
    """Some nodes of a script's partition cannot be used now."""
    partition = re.search(r"^#SBATCH --partition=(\S+)$", script, re.MULTILINE)
    asked = [f"--partition={partition[1]}"] if partition else []
    found = _run(["sinfo", "--noheader", "--Node", *asked, "--format=%t"])
    return any(not re.match("idle|mix|alloc|comp|plnd", state) for state in found.stdout.split())


def submit(script: Path, place: int = 1, after: str = "") -> str:
    """Queue a script and return the job's number. `place` is its argument; `after` a dependency, such as `afterok:12`.

    Raises:
        UserError: Slurm refuses, or does not answer.
    """
    # A job whose dependency can never come true would wait for ever.
    dependency = [f"--dependency={after}", "--kill-on-invalid-dep=yes"] if after else []
    return _sbatch("--parsable", *dependency, str(script.absolute()), str(place)).split(";")[0]


def states(jobs: Sequence[str]) -> dict[str, JobState]:
    """How each job stands.

    Raises:
        UserError: Slurm does not answer.
    """
    found = dict.fromkeys(jobs, JobState("gone"))
    for job in jobs:
        # Not squeue: it fails for all when it has forgotten one.
        done = _run(["scontrol", "--oneliner", "show", "job", job])
        if done.returncode and "Invalid job id" not in done.stderr:
            raise _refused(f"scontrol show job {job}", done.stderr)
        fields = dict(re.findall(r"(\w+)=(\S*)", done.stdout))
        if "JobState" in fields:
            reason = "" if fields.get("Reason") == "None" else fields.get("Reason", "")
            nodes = "" if fields.get("NodeList") == "(null)" else fields.get("NodeList", "")
            found[job] = JobState(fields["JobState"], reason, fields.get("RunTime", ""), nodes)
    return found


def queued(scripts: Mapping[str, Path]) -> list[str]:
    """Jobs in the queue that bear one of the names and run its script."""
    done = _run(["squeue", "--noheader", f"--name={','.join(scripts)}", "--format=%i %o"])
    if done.returncode:
        raise _refused("squeue", done.stderr)
    paths = [str(script.absolute()) for script in scripts.values()]
    lines = [line.partition(" ") for line in done.stdout.splitlines()]
    return [job for job, _, words in lines if any(words == path or words.startswith(f"{path} ") for path in paths)]


def cancel(jobs: Sequence[str]) -> None:
    """End jobs: waiting ones at once; running ones get SIGTERM first, on which training saves."""
    if jobs:
        done = _run(["scancel", *jobs])
        if done.returncode:
            raise _refused(f"scancel {' '.join(jobs)}", done.stderr)


def _sbatch(*words: str, text: str = "") -> str:
    done = _run(["sbatch", *words], text)
    if done.returncode:
        raise _refused("sbatch refused the job", done.stderr)
    return done.stdout.strip()


def _run(words: list[str], given: str = "") -> "subprocess.CompletedProcess[str]":
    environment = {
        name: value
        for name, value in os.environ.items()
        if name in _PASSED or not (name.startswith(_NOT_PASSED) or name in _OF_RANKS)
    }
    try:
        return subprocess.run(
            words, env=environment, input=given, capture_output=True, text=True, errors="replace", timeout=_PATIENCE
        )
    except FileNotFoundError as error:
        raise UserError(f"{words[0]}: not on the path. Slurm's commands are on login nodes") from error
    except subprocess.TimeoutExpired as error:
        said = error.stderr.decode(errors="replace") if isinstance(error.stderr, bytes) else error.stderr or ""
        raise UnavailableError(f"{words[0]}: no answer within {_PATIENCE:.0f} s. {_refusal(said)}") from error


def _refused(what: str, said: str) -> UserError:
    kind = UnavailableError if re.search(f"{_AWAY}|{_FULL}", said, re.IGNORECASE) else UserError
    return kind(f"{what}: {_refusal(said)}")


def _refusal(said: str) -> str:
    """Slurm's own words, in one line, and what to do."""
    lines = dict.fromkeys(re.sub(r"^(s\w+: )?(error: )?", "", line.strip()) for line in said.splitlines())
    words = "; ".join(line for line in lines if line) or "it said nothing"
    remedy = next((remedy for pattern, remedy in _REMEDIES if re.search(pattern, words, re.IGNORECASE)), None)
    return f"{words}. Remedy: {remedy or 'look at the options in the script, and at `scontrol show config`'}"
