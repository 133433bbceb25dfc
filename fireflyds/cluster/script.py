"""The batch script of a job: what a person would write, with every `#SBATCH` line spelled out."""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from fireflyds.config import VERBS, ClusterConfig, Container, Resources
from fireflyds.errors import UserError

LAUNCH = Path(__file__).parents[2] / "launch"
# Options that only jobs with GPUs get.
_OF_GPUS = ("--gres=", "--gpus", "--gpu-bind")


@dataclass(frozen=True, slots=True)
class Job:
    """One batch job: a verb with a frozen configuration."""

    name: str
    verb: str
    folder: Path
    """Where its files are: that of the run."""
    config: Path
    script: Path
    stamp: str = ""
    """Written to `done` when the job has done its work."""
    wait_seconds: int = 0
    """A rank that has left is followed by the others within this time, or they are ended."""

    @property
    def log(self) -> Path:
        """Slurm puts the job's number in place of `%j`; a job that goes on writes on."""
        return self.folder / "logs" / f"slurm-{self.name.rpartition('/')[2]}-%j.log"

    @property
    def done(self) -> Path:
        return self.script.with_suffix(".done")

    @property
    def code(self) -> Path:
        """Holds the exit code of its newest start, once that has ended."""
        return code_file(self.script)


def code_file(script: Path) -> Path:
    return script.with_suffix(".code")


def text(job: Job, cluster: ClusterConfig) -> str:
    """The script. It takes one argument: its place in a chain of jobs of the same run."""
    options = [f"#SBATCH {option}" for option in _options(job, cluster)]
    parts = [
        "#!/bin/bash",
        f"# {job.name}: {job.verb}. Written by launch/submit.py; can be given to sbatch again as it is.",
        *options,
        "",
        *_before(job, cluster),
        *_command(job, cluster),
        "code=$?",
        "",
        *_after(job, cluster),
    ]
    return "\n".join(parts) + "\n"


def _options(job: Job, cluster: ClusterConfig) -> list[str]:
    resources = VERBS[job.verb].resources
    whole = resources is Resources.all_gpus
    gpus = cluster.gpus_per_node if whole else 1 if resources is Resources.one_gpu else 0
    on_gpu = bool(gpus) and not cluster.on_cpu
    further = [option for option in cluster.sbatch.split() if on_gpu or not option.startswith(_OF_GPUS)]
    if cluster.on_cpu or "--gres=" in cluster.sbatch:
        gpus = 0
    partition = cluster.partition if on_gpu or cluster.on_cpu else cluster.cpu_partition or cluster.partition
    found = {
        "job-name": job.name,
        "nodes": cluster.nodes if whole else 1,
        "ntasks-per-node": cluster.gpus_per_node if whole else 1,
        "gpus-per-node": gpus,
        "cpus-per-task": cluster.cpus_per_task,
        "mem": cluster.memory,
        "time": cluster.time,
        "partition": partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "constraint": cluster.constraint,
        "mail-user": cluster.mail_user,
        "mail-type": cluster.mail_type if cluster.mail_user else "",
        "chdir": Path.cwd(),
        "output": job.log.absolute(),
        "open-mode": "append",
        # To the ranks, not to this script: they finish the step, save and leave.
        "signal": f"USR1@{cluster.signal_seconds}" if job.verb == "train" else "",
    }
    put_back = "--requeue" if cluster.requeue else "--no-requeue"
    return [*(_written(name, str(value)) for name, value in found.items() if value), put_back, *further]


def _written(name: str, value: str) -> str:
    """Slurm takes what has spaces in double quotes, and nothing else of a shell's."""
    if found := re.search(r'["\n\\]', value):
        raise UserError(f"{value!r}: holds {found.group()!r}, which no #SBATCH line can. Give another name or folder")
    return f'--{name}="{value}"' if re.search(r"[\s#']", value) else f"--{name}={value}"


def _before(job: Job, cluster: ClusterConfig) -> list[str]:
    lines, code = [], shlex.quote(str(job.code))
    if cluster.chain > 1 and job.verb == "train":
        lines += [
            "# An earlier job of the chain may have done all the work, or ended in a way that another start does not mend.",
            f'if [ "${{1:-1}}" -gt 1 ] && ended=$(grep -sxE "0|2|76" {code}); then',
            '  echo "an earlier job of this chain left with code $ended: nothing to do"; exit "$ended"',
            "fi",
        ]
    lines.append(f"rm -f {code}")
    if job.verb == "train" and cluster.requeue:
        lines.append(f'[ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] || rm -f {_requeued_at(job)}')
    lines += [f"module load {module}" for module in cluster.modules.split()]
    lines += cluster.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    if "MASTER_ADDR" not in cluster.environment and VERBS[job.verb].resources is Resources.all_gpus:
        lines += ["# Rank 0 runs on the first node, where this script runs too.", "export MASTER_ADDR=$(hostname)"]
    lines += [
        "# A step does not take over the job's cores by itself.",
        'if [ -n "$SLURM_CPUS_PER_TASK" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi',
    ]
    if "OMP_NUM_THREADS" not in cluster.environment:
        lines.append("export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}")
    return [*lines, ""]


def _requeued_at(job: Job) -> str:
    """A line for each time the job was put back: its newest checkpoint then."""
    return shlex.quote(str(job.folder / "logs/requeued_at"))


def _command(job: Job, cluster: ClusterConfig) -> list[str]:
    inside = cluster.container is not Container.none
    python = cluster.python or ("python" if inside else sys.executable)
    command = [python, str(LAUNCH / f"{job.verb}.py"), "--config", str(job.config)]
    start = ["srun", f"--wait={job.wait_seconds}"]
    here = str(Path.cwd())
    places = dict.fromkeys([here, str(LAUNCH.parent)])
    folder = job.config.absolute().parent
    if not any(folder.is_relative_to(place) for place in places):
        places[str(folder)] = None
    mounts = [*(f"{place}:{place}" for place in places), *cluster.mounts]
    if cluster.container is Container.pyxis:
        start += [
            f"--container-image={cluster.image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={here}",
        ]
    elif cluster.container is Container.apptainer:
        nv = [] if cluster.on_cpu else ["--nv"]
        start += ["apptainer", "exec", *nv, "--bind", ",".join(mounts), "--pwd", here, cluster.image]
    return [f"{shlex.join(start)} \\", f"  {shlex.join(command)}"]


def _after(job: Job, cluster: ClusterConfig) -> list[str]:
    lines = [f'echo "$code" > {shlex.quote(str(job.code))}']
    if job.stamp:
        lines.append(f'if [ "$code" -eq 0 ]; then echo {job.stamp} > {shlex.quote(str(job.done))}; fi')
    if job.verb == "train" and cluster.requeue:
        places, steps = shlex.quote(str(job.folder / "checkpoints")), _requeued_at(job)
        often = cluster.max_failures + 1
        lines += [
            "# 0: all steps are done. 2: wrong input. 76: a file STOP asked for it. After anything else (75: the time limit or",
            "# preemption; else a rank or a node was lost) the job goes on later, as long as there are newer checkpoints.",
            'case "$code" in 0 | 2 | 76) exit "$code" ;; esac',
            f'saved=$(ls -d {places}/step-* 2> /dev/null | sort -V | tail -n 1); echo "${{saved:-nothing}}" >> {steps}',
            f"if [ \"$(tail -n {often} {steps} | uniq -c | awk 'NR == 1 {{print $1}}')\" = {often} ]; then",
            f'  echo "left with code $code, {often} times in a row without a newer checkpoint: not put back"; exit "$code"',
            "fi",
            'echo "left with code $code: put back into the queue"',
            'scontrol requeue "$SLURM_JOB_ID"',
        ]
    return [*lines, 'exit "$code"']
