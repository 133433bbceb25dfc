"""What starts a trial: processes on this machine, or a job. Both outlive whoever started them."""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Protocol

import psutil

from fireflyds.cluster import script, slurm, submission
from fireflyds.config import ClusterConfig, Scheduler
from fireflyds.errors import UserError

_PID = "logs/launcher.pid"
LOG = "logs/launcher.log"


class Launcher(Protocol):
    def start(self, run_dir: Path, slot: int) -> None:
        """Train what is frozen in the run's `config.yaml`; `slot` is the trial's place among those at the same time."""

    def is_running(self, run_dir: Path) -> bool:
        """What was started for the run, by whomever, has not ended."""

    def stop(self, run_dir: Path) -> bool:
        """Let it save and leave, when the study itself is stopped. False where it had better go on by itself."""

    def kill(self, run_dir: Path) -> None:
        """End it at once."""


def launcher_of(cluster: ClusterConfig, parallel: int) -> Launcher:
    """Raises `UserError` where there is no Slurm, or there are too few GPUs."""
    if cluster.scheduler is Scheduler.slurm:
        slurm.require()
        return SlurmLauncher(cluster)
    return LocalLauncher(cluster, parallel)


class LocalLauncher:
    """Processes on this machine, each trial with GPUs of its own."""

    def __init__(self, cluster: ClusterConfig, parallel: int) -> None:
        if cluster.nodes > 1:
            raise UserError(
                f"cluster.nodes={cluster.nodes}: trials on this machine have one node. Give cluster=slurm, or nodes=1"
            )
        self._ranks, self._parallel = cluster.gpus_per_node, parallel
        self._gpus: list[str] = [] if cluster.on_cpu else _visible_gpus()
        needed = parallel * self._ranks
        if not cluster.on_cpu and needed > len(self._gpus):
            raise UserError(
                f"sweep.parallel={parallel} x cluster.gpus_per_node={self._ranks} = {needed} GPUs, but {len(self._gpus)} are "
                "visible. Give fewer, or cluster=local_cpu"
            )
        self._started: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, run_dir: Path, slot: int) -> None:
        (run_dir / "logs").mkdir(parents=True, exist_ok=True)
        train = [str(script.LAUNCH / "train.py"), "--config", str(run_dir / "config.yaml")]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self._ranks}"]
        words = [*(torchrun if self._ranks > 1 else [sys.executable]), *train]
        environment = dict(os.environ)
        if self._gpus:
            mine = self._gpus[slot * self._ranks : (slot + 1) * self._ranks]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(mine)
        pid = run_dir / _PID
        pid.unlink(missing_ok=True)
        # The process itself says who it is, before it begins: whoever started it may be killed in between.
        shell = f'echo $$ > "{pid}.partial" && mv "{pid}.partial" "{pid}" && exec {shlex.join(words)}'
        cores = sorted(os.sched_getaffinity(0))
        own = cores[slot :: self._parallel] if not self._gpus else cores
        with (run_dir / LOG).open("ab") as log:
            self._started[run_dir] = subprocess.Popen(
                ["sh", "-c", shell], env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
                # Trials that share cores fight over them.
                preexec_fn=lambda: os.sched_setaffinity(0, own or cores),
            )  # fmt: skip

    def is_running(self, run_dir: Path) -> bool:
        if run_dir in self._started:
            return self._started[run_dir].poll() is None
        return self._process(run_dir) is not None

    def _process(self, run_dir: Path) -> psutil.Process | None:
        """The process that said it is this run's, if that is what it still is: numbers are given out again."""
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            found = psutil.Process(int((run_dir / _PID).read_text()))
            if found.status() != psutil.STATUS_ZOMBIE and str(run_dir / "config.yaml") in " ".join(found.cmdline()):
                return found
        return None

    def stop(self, run_dir: Path) -> bool:
        self._signal(run_dir, signal.SIGTERM)
        return True

    def kill(self, run_dir: Path) -> None:
        self._signal(run_dir, signal.SIGKILL)

    def _signal(self, run_dir: Path, number: signal.Signals) -> None:
        own, found = self._started.get(run_dir), self._process(run_dir)
        leader = own.pid if own is not None and own.poll() is None else found.pid if found else None
        if leader is not None:
            with contextlib.suppress(ProcessLookupError):
                # To the session: to the launcher and to all ranks.
                os.killpg(leader, number)


def _visible_gpus() -> list[str]:
    """Names of this machine's GPUs as CUDA_VISIBLE_DEVICES has them, without asking CUDA."""
    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    if given is not None:
        return [name for name in given.split(",") if name.strip()]
    return [str(index) for index in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


class SlurmLauncher:
    """A job for each trial."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster = cluster

    def start(self, run_dir: Path, slot: int) -> None:
        config = (run_dir / "config.yaml").read_text(encoding="utf-8")
        planned = submission.plan_job("train", self._name(run_dir), run_dir, run_dir, config)
        submission.submit([planned], self._cluster, run_dir)

    def _name(self, run_dir: Path) -> str:
        return f"{run_dir.parent.name}/{run_dir.name}"

    def _jobs(self, run_dir: Path) -> list[str]:
        """By its name as well: a job may have been queued by somebody who was killed before he could note its number."""
        noted = [record.id for record in submission.read_job_records(run_dir)]
        states = slurm.states(noted)
        return [job for job in noted if states[job].active] or slurm.queued(
            {self._name(run_dir): run_dir / "submit.sh"}
        )

    def is_running(self, run_dir: Path) -> bool:
        return bool(self._jobs(run_dir))

    def stop(self, run_dir: Path) -> bool:
        return False

    def kill(self, run_dir: Path) -> None:
        slurm.cancel(self._jobs(run_dir))
