"""Generates the batch script of a job, with every option as an explicit `#SBATCH` line."""

import re
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path

from fireflyds.config import VERBS, ClusterConfig, Container, Resources
from fireflyds.errors import UserError
from fireflyds.runs import layout

LAUNCH = Path(__file__).parents[2] / "launch"
# Prefixes of options that are passed only to jobs with GPUs.
_GPU_OPTIONS = ("--gres=", "--gpus", "--gpu-bind")
# Exit codes of training after which a restart is of no use, as a pattern.
_FINAL_CODES = f"0|{layout.EXIT_USER_ERROR}|{layout.EXIT_STOPPED}"


@dataclass(frozen=True, slots=True)
class Job:
    """One batch job: a verb with a frozen configuration."""

    name: str
    verb: str
    folder: Path
    """Folder of the run that the job belongs to."""
    config: Path
    script: Path
    stamp: str = ""
    """Text written to the file `done` when the job succeeds; empty: nothing is written."""
    wait_seconds: int = 0
    """Value of `srun --wait`: seconds after the first rank's exit until remaining ranks are killed."""

    @property
    def log(self) -> Path:
        """Path of the log. Slurm replaces `%j` by the job's ID; a requeued job appends to its log."""
        return self.folder / layout.LOGS / f"slurm-{self.name.rpartition('/')[2]}-%j.log"

    @property
    def done(self) -> Path:
        """Path of the file that is written when the job succeeds."""
        return self.script.with_suffix(".done")

    @property
    def code(self) -> Path:
        """Path of the file with the exit code of the job's last start; absent while it runs."""
        return code_file(self.script)


def code_file(script: Path) -> Path:
    """Path of the file with the exit code of the last start of a job script."""
    return script.with_suffix(".code")


def text(job: Job, cluster: ClusterConfig) -> str:
    """Returns the script. Its argument is the position in a chain of jobs of the same run, from 1."""
    options = [f"#SBATCH {option}" for option in _options(job, cluster)]
    parts = [
        "#!/bin/bash",
        f"# {job.name}: {job.verb}. Written by launch/submit.py; can be submitted again unchanged with sbatch.",
        *options,
        "",
        *_setup_lines(job, cluster),
        *_command_lines(job, cluster),
        "code=$?",
        "",
        *_exit_lines(job, cluster),
    ]
    return "\n".join(parts) + "\n"


def _options(job: Job, cluster: ClusterConfig) -> list[str]:
    resources = VERBS[job.verb].resources
    uses_all_gpus = resources is Resources.all_gpus
    gpus = cluster.gpus_per_node if uses_all_gpus else 1 if resources is Resources.one_gpu else 0
    on_gpu = bool(gpus) and not cluster.on_cpu
    extra_options = [option for option in cluster.sbatch.split() if on_gpu or not option.startswith(_GPU_OPTIONS)]
    if cluster.on_cpu or "--gres=" in cluster.sbatch:
        gpus = 0
    partition = cluster.partition if on_gpu or cluster.on_cpu else cluster.cpu_partition or cluster.partition
    options = {
        "job-name": job.name,
        "nodes": cluster.nodes if uses_all_gpus or resources is Resources.cpu_nodes else 1,
        "ntasks-per-node": cluster.gpus_per_node if uses_all_gpus else 1,
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
        # Sent to the ranks, not to this script: they finish the step, save a checkpoint and exit.
        "signal": f"USR1@{cluster.signal_seconds}" if job.verb == "train" else "",
    }
    requeue_option = "--requeue" if cluster.requeue else "--no-requeue"
    survives = ["--no-kill"] if resources is Resources.cpu_nodes and cluster.nodes > 1 else []
    return [
        *(_format_option(name, str(value)) for name, value in options.items() if value),
        requeue_option,
        *survives,
        *extra_options,
    ]


def _format_option(name: str, value: str) -> str:
    """Formats an option. Slurm reads values with spaces in double quotes, but no other shell syntax."""
    if match := re.search(r'["\n\\]', value):
        raise UserError(
            f"contains {match.group()!r}, invalid in an #SBATCH line",
            key=f"#SBATCH --{name}",
            value=f"{value!r}",
            remedy="Give another name or folder",
        )
    return f'--{name}="{value}"' if re.search(r"[\s#']", value) else f"--{name}={value}"


def _setup_lines(job: Job, cluster: ClusterConfig) -> list[str]:
    lines, code = [], shlex.quote(str(job.code))
    if cluster.chain > 1 and job.verb == "train":
        lines += [
            "# Exit if an earlier job of the chain completed the run or failed in a way that a restart does not fix.",
            f'if [ "${{1:-1}}" -gt 1 ] && ended=$(grep -sxE "{_FINAL_CODES}" {code}); then',
            '  echo "an earlier job of this chain exited with code $ended: nothing to do"; exit "$ended"',
            "fi",
        ]
    lines.append(f"rm -f {code}")
    if job.verb == "train" and cluster.requeue:
        lines.append(f'[ "${{SLURM_RESTART_COUNT:-0}}" -gt 0 ] || rm -f {_requeue_file(job)}')
    lines += [f"module load {module}" for module in cluster.modules.split()]
    lines += cluster.setup
    lines += [f"export {name}={shlex.quote(value)}" for name, value in cluster.environment.items()]
    has_ranks = VERBS[job.verb].resources in (Resources.all_gpus, Resources.cpu_nodes)
    if "MASTER_ADDR" not in cluster.environment and has_ranks:
        lines += ["# Rank 0 runs on the first node, where this script runs too.", "export MASTER_ADDR=$(hostname)"]
    lines += [
        "# srun does not inherit the job's --cpus-per-task by itself.",
        'if [ -n "$SLURM_CPUS_PER_TASK" ]; then export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK; fi',
    ]
    if "OMP_NUM_THREADS" not in cluster.environment:
        lines.append("export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}")
    return [*lines, ""]


def _requeue_file(job: Job) -> str:
    """Returns the quoted path of a file with one line per requeue: the newest checkpoint at that time."""
    return shlex.quote(str(job.folder / layout.REQUEUED_AT))


def _command_lines(job: Job, cluster: ClusterConfig) -> list[str]:
    in_container = cluster.container is not Container.none
    python = cluster.python or ("python" if in_container else sys.executable)
    command = [python, str(LAUNCH / f"{job.verb}.py"), "--config", str(job.config)]
    shares_nodes = VERBS[job.verb].resources is Resources.cpu_nodes and cluster.nodes > 1
    # The other processes of such a verb take over what a lost node had.
    launcher = ["srun", "--wait=0", "--no-kill"] if shares_nodes else ["srun", f"--wait={job.wait_seconds}"]
    working_dir = str(Path.cwd())
    mounted = dict.fromkeys([working_dir, str(LAUNCH.parent)])
    folder = job.config.absolute().parent
    if not any(folder.is_relative_to(path) for path in mounted):
        mounted[str(folder)] = None
    mounts = [*(f"{path}:{path}" for path in mounted), *cluster.mounts]
    if cluster.container is Container.pyxis:
        launcher += [
            f"--container-image={cluster.image}",
            f"--container-mounts={','.join(mounts)}",
            f"--container-workdir={working_dir}",
        ]
    elif cluster.container is Container.apptainer:
        nv = [] if cluster.on_cpu else ["--nv"]
        launcher += ["apptainer", "exec", *nv, "--bind", ",".join(mounts), "--pwd", working_dir, cluster.image]
    lines = [f"{shlex.join(launcher)} \\", f"  {shlex.join(command)}"]
    if shares_nodes:
        alone = [launcher[0], "--nodes=1", "--ntasks=1", *launcher[1:]]
        lines[-1] += " \\"
        lines += [
            "  || { echo 'a process was lost: one finishes what is left'; \\",
            f"       {shlex.join(alone)} {shlex.join(command)}; }}",
        ]
    return lines


def _exit_lines(job: Job, cluster: ClusterConfig) -> list[str]:
    lines = [f'echo "$code" > {shlex.quote(str(job.code))}']
    if job.stamp:
        lines.append(f'if [ "$code" -eq 0 ]; then echo {job.stamp} > {shlex.quote(str(job.done))}; fi')
    if job.verb == "train" and cluster.requeue:
        checkpoints, requeues = shlex.quote(str(job.folder / layout.CHECKPOINTS)), _requeue_file(job)
        max_starts = cluster.max_failures + 1
        lines += [
            f"# 0: finished. {layout.EXIT_USER_ERROR}: invalid input. {layout.EXIT_STOPPED}: a STOP file.",
            f"# Any other code ({layout.EXIT_INTERRUPTED}: time limit or preemption; else a lost rank or node)",
            "# the job is requeued, as long as there are newer checkpoints.",
            f'case "$code" in {_FINAL_CODES.replace("|", " | ")}) exit "$code" ;; esac',
            f"saved=$(ls -d {checkpoints}/{layout.STEP_PREFIX}* 2> /dev/null | sort -V | tail -n 1)",
            f'echo "${{saved:-none}}" >> {requeues}',
            f"if [ \"$(tail -n {max_starts} {requeues} | uniq -c | awk 'NR == 1 {{print $1}}')\" = {max_starts} ]; "
            "then",
            f'  echo "exited with code $code, {max_starts} times in a row without a newer checkpoint: not requeued"; '
            'exit "$code"',
            "fi",
            'echo "exited with code $code: requeued"',
            'scontrol requeue "$SLURM_JOB_ID"',
        ]
    return [*lines, 'exit "$code"']
