"""Jobs in a real Slurm: two nodes on this machine."""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import slurm_cluster
from grid import ROOT, near
from samples import ENGLISH
from tiny_run import prepare_store, tiny_keys

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.skipif(
        bool(slurm_cluster.missing()), reason=f"Slurm is not here: {', '.join(slurm_cluster.missing())}"
    ),
]
STEPS = 60
# For what comes sooner wherever the machine is not busy with something else.
PATIENCE_SECONDS = 300


class Cluster:
    """A folder to work in and the queue."""

    def __init__(self, folder: Path, variables: dict[str, str], verb) -> None:
        self.folder, self.variables = folder, variables
        self._verb = verb

    def submit(self, *arguments: str, check: bool = True):
        return self._verb("submit", *arguments, env=self.variables, check=check)

    def slurm(self, *words: str) -> str:
        environment = dict(self.variables)
        return subprocess.run(words, env=environment, capture_output=True, text=True, check=True).stdout

    def job(self, run: str, place: int = 0) -> str:
        return json.loads((self.folder / "runs" / run / "jobs.json").read_text())[place]["id"]

    def state(self, job: str) -> str:
        found = re.search(r"JobState=(\w+)", self.slurm("scontrol", "show", "job", job))
        assert found
        return found.group(1)

    def wait(self, job: str, *states: str) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while (state := self.state(job)) not in states:
            if state == "PENDING" and "Reason=BeginTime" in self.slurm("scontrol", "show", "job", job):
                self._start_now(job)
            assert time.monotonic() < until, (state, self.log(job))
            time.sleep(0.2)

    def _start_now(self, job: str) -> None:
        """Slurm lets a job that was put back wait for two minutes, by when all of it has ended everywhere."""
        if self.slurm("sinfo", "--noheader", "--Node", "--partition=main", "--format=%t").split() == ["idle", "idle"]:
            time.sleep(1)
            self.slurm("scontrol", "update", f"JobId={job}", "StartTime=now")

    def log(self, job: str) -> str:
        return "".join(file.read_text() for file in self.folder.rglob(f"slurm-*-{job}.log"))

    def rows(self, run: str) -> list[dict]:
        file = self.folder / "runs" / run / "metrics.jsonl"
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        return [json.loads(line) for line in lines if line.endswith("\n")]

    def losses(self, run: str) -> list[float]:
        return [row["loss"] for row in self.rows(run)]

    def wait_for_step(self, run: str, step: int) -> None:
        until = time.monotonic() + PATIENCE_SECONDS
        while len(self.rows(run)) < step:
            assert time.monotonic() < until
            time.sleep(0.05)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory, verbs_of, base_tokenizer: Path) -> Iterator[Cluster]:
    folder = tmp_path_factory.mktemp("slurm")
    prepare_store(verbs_of(folder), folder, base_tokenizer, ENGLISH * 4)
    with slurm_cluster.running() as variables:
        yield Cluster(folder, variables, verbs_of(folder))


@pytest.fixture(scope="module")
def training(base_tokenizer: Path) -> list[str]:
    return [
        "verb=train",
        *tiny_keys(base_tokenizer),
        f"optim.steps={STEPS}",
        "seq_len=256",
        "global_batch_size=8",
        "checkpoint.every=5",
        "log_every=5",
        "optim.schedule=constant",
        "cluster=slurm_cpu",
        "cluster.nodes=2",
    ]


@pytest.fixture(scope="module")
def undisturbed(cluster: Cluster, training: list[str]) -> list[float]:
    shown = cluster.submit(*training, "run=undisturbed").stdout
    job = cluster.job("undisturbed")
    assert f"undisturbed: job {job}, runs/undisturbed/submit.sh" in shown
    assert "python launch/submit.py action=status run=undisturbed" in shown
    cluster.wait(job, "COMPLETED")
    return cluster.losses("undisturbed")


def test_two_nodes_have_the_losses_of_one(cluster: Cluster, training: list[str], undisturbed: list[float]) -> None:
    assert len(undisturbed) == STEPS
    assert "60 steps of 8 rows = 2 ranks x 1 x 4 accumulated" in cluster.log(cluster.job("undisturbed"))
    cluster.submit(*training, "run=one", "cluster.nodes=1")
    cluster.wait(cluster.job("one"), "COMPLETED")
    assert "60 steps of 8 rows = 1 ranks x 1 x 8 accumulated" in cluster.log(cluster.job("one"))
    near(cluster.losses("one"), undisturbed, 3e-6)
    shown = cluster.submit("action=status", "run=one").stdout
    assert "one: job" in shown
    assert "COMPLETED" in shown
    assert "run is finished at step 60 of 60" in shown
    assert "step 60/60" in cluster.submit("action=logs", "run=one").stdout


def test_a_job_that_is_preempted_and_loses_a_rank_ends_as_if_undisturbed(
    cluster: Cluster, training: list[str], undisturbed: list[float]
) -> None:
    cluster.submit(*training, "run=preempted")
    job = cluster.job("preempted")
    cluster.wait_for_step("preempted", 8)
    again = cluster.submit(*training, "run=preempted", check=False)
    assert again.returncode == 2
    assert f"submitted already: preempted (job {job}, RUNNING)" in again.stderr
    cluster.slurm("scontrol", "requeue", job)
    cluster.wait(job, "PENDING")
    stopped = len(cluster.rows("preempted"))
    assert 8 <= stopped < STEPS
    status = json.loads((cluster.folder / "runs/preempted/status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == ("stopped", stopped, "SIGTERM")
    cluster.wait(job, "RUNNING")
    cluster.wait_for_step("preempted", stopped + 5)
    ranks = [
        each
        for each in psutil.process_iter()
        if "runs/preempted/config.yaml" in _words(each) and "python" in each.name()
    ]
    assert len(ranks) == 2
    ranks[0].kill()
    cluster.wait(job, "PENDING")
    assert ": requeued\n" in cluster.log(job)
    assert re.search(r"task \d: Exited with exit code 1\n", cluster.log(job))
    cluster.wait(job, "COMPLETED")
    assert cluster.losses("preempted") == undisturbed


def _words(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_job_at_its_time_limit_goes_on_until_a_stop_file_ends_it(
    cluster: Cluster, training: list[str], undisturbed: list[float]
) -> None:
    # Slurm looks every half a minute, so the signal comes 60 to 90 s after the start: training has begun by then.
    cluster.submit(*training, "run=limited", "optim.steps=9999", "cluster.time=00:02:00", "cluster.signal_seconds=60")
    job = cluster.job("limited")
    cluster.wait(job, "RUNNING")
    cluster.wait(job, "PENDING")
    reached = json.loads((cluster.folder / "runs/limited/status.json").read_text())
    assert (reached["exit_code"], reached["message"]) == (75, "SIGUSR1")
    cluster.wait(job, "RUNNING")
    cluster.wait_for_step("limited", reached["step"] + 3)
    (cluster.folder / "runs/limited/STOP").touch()
    cluster.wait(job, "FAILED")
    assert "ExitCode=76:0" in cluster.slurm("scontrol", "show", "job", job)
    assert cluster.losses("limited")[:STEPS] == undisturbed[: len(cluster.rows("limited"))]


def test_a_chain_takes_the_place_of_requeueing(cluster: Cluster, training: list[str], undisturbed: list[float]) -> None:
    cluster.submit(*training, "run=chain", "cluster.requeue=false", "cluster.chain=3")
    first, second, third = (cluster.job("chain", place) for place in range(3))
    cluster.wait_for_step("chain", 5)
    # What the time limit does.
    cluster.slurm("scancel", "--signal=USR1", first)
    cluster.wait(first, "FAILED")
    cluster.wait(second, "COMPLETED")
    cluster.wait(third, "COMPLETED")
    assert "an earlier job of this chain exited with code 0: nothing to do" in cluster.log(third)
    assert cluster.losses("chain") == undisturbed


def test_a_road_is_a_chain_of_jobs(cluster: Cluster, training: list[str], base_tokenizer: Path) -> None:
    keys = ", ".join(f"'{each}'" for each in training[1:-2])
    (cluster.folder / "way.yaml").write_text(f"""
name: way
stages:
  - {{name: prepare, verb: prepare, output: store/manifest.json, \
overrides: [data=documents.txt, 'tokenizer={base_tokenizer}', out=runs/way/store, workers=1]}}
  - {{name: train, verb: train, output: sft, overrides: [run=way/sft, {keys}, data=runs/way/store, optim.steps=4]}}
  - {{name: export, verb: export, output: sft/export/export.json, overrides: [run=way/sft]}}
""")
    arguments = ["road=way.yaml", "cluster=slurm_cpu", "cluster.nodes=2"]
    cluster.submit(*arguments)
    jobs = [cluster.job("way", place) for place in range(3)]
    for job in jobs:
        cluster.wait(job, "COMPLETED")
    assert (cluster.folder / "runs/way/sft/export/model.safetensors").exists()
    shown = cluster.submit("action=status", "run=way").stdout
    assert [line.split(":")[0] for line in shown.splitlines()] == ["prepare", "train", "export"]
    assert "every stage is complete; nothing to submit" in cluster.submit(*arguments).stdout


def test_what_slurm_refuses_leaves_nothing_behind(cluster: Cluster, training: list[str]) -> None:
    for option, expected in (
        ("cluster.partition=nope", r"[Ii]nvalid partition.*\. Give cluster\.partition="),
        ("cluster.gpu=H100", r"gres.*\. This cluster .*cluster\.sbatch=--gres=gpu:8"),
        ("cluster.constraint=a100", r"Invalid feature.*\. Give another cluster\.constraint"),
    ):
        done = cluster.submit(*training, "run=refused", option, check=False)
        assert done.returncode == 2
        assert re.search(expected, done.stderr), done.stderr
    assert not (cluster.folder / "runs" / "refused").exists()
    assert "refused" not in cluster.slurm("squeue", "--format=%j")


def test_a_node_that_is_down_is_waited_for(cluster: Cluster, training: list[str]) -> None:
    cluster.slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    try:
        cluster.submit(*training, "run=waits")
        assert cluster.state(cluster.job("waits")) == "PENDING"
        cluster.submit("action=cancel", "run=waits")
    finally:
        cluster.slurm("scontrol", "update", "NodeName=n2", "State=RESUME")
    done = cluster.submit(*training, "run=large", "cluster.nodes=4", check=False)
    assert "compare cluster.nodes" in done.stderr
    assert not (cluster.folder / "runs" / "large").exists()


def test_cancelling_saves_and_puts_nothing_back(cluster: Cluster, training: list[str]) -> None:
    cluster.submit(*training, "run=ended", "optim.steps=9999")
    job = cluster.job("ended")
    cluster.wait_for_step("ended", 3)
    assert f"cancelled: ended (job {job})" in cluster.submit("action=cancel", "run=ended").stdout
    cluster.wait(job, "CANCELLED")
    until = time.monotonic() + PATIENCE_SECONDS
    while (status := json.loads((cluster.folder / "runs/ended/status.json").read_text()))["state"] == "running":
        assert time.monotonic() < until
        time.sleep(0.1)
    assert (status["state"], status["message"]) == ("stopped", "SIGTERM")
    time.sleep(1)
    assert cluster.state(job) == "CANCELLED"


def test_a_study_of_jobs_that_is_killed_goes_on(cluster: Cluster, training: list[str]) -> None:
    """Two trials at a time, one node each; one trial is so bad that it is pruned."""
    study = ["study=lr", "sweep.space.optim.lr={choices: [1e-3, 3e-4, 1e-9]}", "sweep.sampler=grid", "sweep.parallel=2"]
    study += [
        "sweep.poll_seconds=0.2",
        "sweep.startup_trials=2",
        "sweep.warmup_steps=10",
        *training[1:-1],
        "cluster.nodes=1",
    ]
    words = [sys.executable, str(ROOT / "launch" / "sweep.py"), *study]
    environment = os.environ | cluster.variables
    with (cluster.folder / "sweep.log").open("w") as log:
        parent = subprocess.Popen(words, cwd=cluster.folder, env=environment, stdout=log, stderr=log)
        cluster.wait_for_step("lr/trial-0001", 3)
        parent.kill()
        parent.wait()
        assert (
            subprocess.run(words, cwd=cluster.folder, env=environment, stdout=log, stderr=log, timeout=180).returncode
            == 0
        )
    shown = (cluster.folder / "sweep.log").read_text()
    assert [shown.count(f"trial {number}: starts") for number in range(3)] == [1, 1, 1]
    assert "trial 2: pruned at step" in shown
    jobs = [cluster.job(f"lr/trial-{number:04d}") for number in range(3)]
    assert len({*jobs}) == 3
    assert [cluster.state(job) for job in jobs] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert len(cluster.rows("lr/trial-0002")) < STEPS
    losses = [cluster.losses(f"lr/trial-{number:04d}") for number in range(2)]
    assert [len(each) for each in losses] == [STEPS, STEPS]
    assert losses[0][-1] < losses[1][-1]
    assert "best: trial 0, loss" in shown
    assert (cluster.folder / "runs/lr/parallel_coordinates.png").exists()
