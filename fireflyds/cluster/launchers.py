"""Launchers of trials: local processes or Slurm jobs. Both keep running when the sweep process exits."""

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
from fireflyds.runs import layout


class Launcher(Protocol):
    """Starts, observes and ends trials; each is identified by its run directory."""

    def start(self, run_dir: Path, slot: int) -> None:
        """Starts training from the run's frozen `config.yaml`; `slot` is the index among concurrent trials."""

    def is_running(self, run_dir: Path) -> bool:
        """True while a process or job of the run is active, including one started by an earlier sweep process."""

    def stop(self, run_dir: Path) -> bool:
        """Asks the trial to save and exit when the sweep is interrupted. Returns False if it keeps running instead."""

    def kill(self, run_dir: Path) -> None:
        """Terminates the trial immediately."""


def launcher_of(cluster: ClusterConfig, parallel: int) -> Launcher:
    """Returns the launcher of the configured scheduler.

    Raises:
        UserError: Slurm is not installed, or too few GPUs are visible.
    """
    if cluster.scheduler is Scheduler.slurm:
        slurm.require()
        return SlurmLauncher(cluster)
    return LocalLauncher(cluster, parallel)


class LocalLauncher:
    """Starts trials as processes on this machine, each with its own GPUs, or with its own cores without GPUs."""

    def __init__(self, cluster: ClusterConfig, parallel: int) -> None:
        if cluster.nodes > 1:
            raise UserError(
                "local trials run on one node",
                key="cluster.nodes",
                value=cluster.nodes,
                remedy="Give cluster=slurm, or nodes=1",
            )
        self._ranks, self._parallel = cluster.gpus_per_node, parallel
        self._gpus: list[str] = [] if cluster.on_cpu else _visible_gpus()
        needed = parallel * self._ranks
        if not cluster.on_cpu and needed > len(self._gpus):
            raise UserError(
                f"sweep.parallel={parallel} x cluster.gpus_per_node={self._ranks} = {needed} GPUs, but "
                f"{len(self._gpus)} are visible",
                remedy="Give fewer, or cluster=local_cpu",
            )
        self._started: dict[Path, subprocess.Popen[bytes]] = {}

    def start(self, run_dir: Path, slot: int) -> None:
        """Starts the run as a process in a new session, on the GPUs or cores of `slot`; its output goes to a log."""
        (run_dir / layout.LOGS).mkdir(parents=True, exist_ok=True)
        train = [str(script.LAUNCH / "train.py"), "--config", str(run_dir / layout.CONFIG)]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={self._ranks}"]
        command = [*(torchrun if self._ranks > 1 else [sys.executable]), *train]
        environment = dict(os.environ)
        if self._gpus:
            gpus = self._gpus[slot * self._ranks : (slot + 1) * self._ranks]
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
        pid_file = run_dir / layout.LAUNCHER_PID
        pid_file.unlink(missing_ok=True)
        # The process writes its own PID before training starts: the sweep process may be killed at any time.
        shell = f'echo $$ > "{pid_file}.partial" && mv "{pid_file}.partial" "{pid_file}" && exec {shlex.join(command)}'
        cores = sorted(os.sched_getaffinity(0))
        slot_cores = cores[slot :: self._parallel] if not self._gpus else cores
        with (run_dir / layout.LAUNCHER_LOG).open("ab") as log:
            self._started[run_dir] = subprocess.Popen(
                ["sh", "-c", shell],
                env=environment,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                # Concurrent trials on CPUs get disjoint cores: sharing them slows all of them down.
                preexec_fn=lambda: os.sched_setaffinity(0, slot_cores or cores),
            )

    def is_running(self, run_dir: Path) -> bool:
        """True while the process of the run is alive, including one started by an earlier sweep process."""
        if run_dir in self._started:
            return self._started[run_dir].poll() is None
        return self._process(run_dir) is not None

    def _process(self, run_dir: Path) -> psutil.Process | None:
        """Returns the live process of the run, or None. Compares the command line: PIDs are reused."""
        with contextlib.suppress(OSError, ValueError, psutil.Error):
            process = psutil.Process(int((run_dir / layout.LAUNCHER_PID).read_text()))
            if process.status() != psutil.STATUS_ZOMBIE and str(run_dir / layout.CONFIG) in " ".join(process.cmdline()):
                return process
        return None

    def stop(self, run_dir: Path) -> bool:
        """Sends SIGTERM to the process, which saves and exits. Returns True."""
        self._signal(run_dir, signal.SIGTERM)
        return True

    def kill(self, run_dir: Path) -> None:
        """Sends SIGKILL to the process."""
        self._signal(run_dir, signal.SIGKILL)

    def _signal(self, run_dir: Path, number: signal.Signals) -> None:
        child, process = self._started.get(run_dir), self._process(run_dir)
        leader = child.pid if child is not None and child.poll() is None else process.pid if process else None
        if leader is not None:
            with contextlib.suppress(ProcessLookupError):
                # The whole process group: the launcher and all ranks.
                os.killpg(leader, number)


def _visible_gpus() -> list[str]:
    """Returns the GPU identifiers as in CUDA_VISIBLE_DEVICES, without initialising CUDA."""
    visible_devices = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible_devices is not None:
        return [name for name in visible_devices.split(",") if name.strip()]
    return [str(index) for index in range(len(list(Path("/dev").glob("nvidia[0-9]*"))))]


class SlurmLauncher:
    """Starts each trial as a Slurm job."""

    def __init__(self, cluster: ClusterConfig) -> None:
        self._cluster = cluster

    def start(self, run_dir: Path, slot: int) -> None:
        """Submits the run as a Slurm job; `slot` is not used."""
        config = (run_dir / layout.CONFIG).read_text(encoding="utf-8")
        planned = submission.plan_job("train", self._name(run_dir), run_dir, run_dir, config)
        submission.submit([planned], self._cluster, run_dir)

    def _name(self, run_dir: Path) -> str:
        return f"{run_dir.parent.name}/{run_dir.name}"

    def _jobs(self, run_dir: Path) -> list[str]:
        """Returns the IDs of active jobs; finds a job by its name if a kill prevented recording it."""
        recorded = [record.id for record in submission.read_job_records(run_dir)]
        states = slurm.states(recorded)
        return [job for job in recorded if states[job].active] or slurm.queued(
            {self._name(run_dir): run_dir / layout.SUBMIT_SCRIPT}
        )

    def is_running(self, run_dir: Path) -> bool:
        """True while a job of the run is pending or running."""
        return bool(self._jobs(run_dir))

    def stop(self, run_dir: Path) -> bool:
        """Returns False: jobs keep running when the sweep is interrupted."""
        return False

    def kill(self, run_dir: Path) -> None:
        """Cancels the jobs of the run."""
        slurm.cancel(self._jobs(run_dir))
