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
# Upper limit of every wait; an idle machine needs less.
TIMEOUT_SECONDS = 300


class Cluster:
    """A Slurm cluster and the folder that jobs are submitted from."""

    def __init__(self, folder: Path, variables: dict[str, str], verb) -> None:
        self.folder, self.variables = folder, variables
        self._verb = verb

    def submit(self, *arguments: str, check: bool = True):
        return self._verb("submit", *arguments, env=self.variables, check=check)

    def slurm(self, *command: str) -> str:
        environment = dict(self.variables)
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout

    def job(self, run: str, index: int = 0) -> str:
        return json.loads((self.folder / "runs" / run / "jobs.json").read_text())[index]["id"]

    def state(self, job: str) -> str:
        match = re.search(r"JobState=(\w+)", self.slurm("scontrol", "show", "job", job))
        assert match
        return match.group(1)

    def wait(self, job: str, *states: str) -> None:
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while (state := self.state(job)) not in states:
            if state == "PENDING" and "Reason=BeginTime" in self.slurm("scontrol", "show", "job", job):
                self._start_now(job)
            assert time.monotonic() < deadline, (state, self.log(job))
            time.sleep(0.2)

    def _start_now(self, job: str) -> None:
        """Slurm holds a requeued job for two minutes, until its processes have ended on every node."""
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
        deadline = time.monotonic() + TIMEOUT_SECONDS
        while len(self.rows(run)) < step:
            assert time.monotonic() < deadline
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
def uninterrupted_losses(cluster: Cluster, training: list[str]) -> list[float]:
    stdout = cluster.submit(*training, "run=undisturbed").stdout
    job = cluster.job("undisturbed")
    assert f"undisturbed: job {job}, runs/undisturbed/submit.sh" in stdout
    assert "python launch/submit.py action=status run=undisturbed" in stdout
    cluster.wait(job, "COMPLETED")
    return cluster.losses("undisturbed")


def test_two_nodes_have_the_losses_of_one(
    cluster: Cluster, training: list[str], uninterrupted_losses: list[float]
) -> None:
    assert len(uninterrupted_losses) == STEPS
    assert "60 steps of 8 rows = 2 ranks x 1 x 4 accumulated" in cluster.log(cluster.job("undisturbed"))
    cluster.submit(*training, "run=one", "cluster.nodes=1")
    cluster.wait(cluster.job("one"), "COMPLETED")
    assert "60 steps of 8 rows = 1 ranks x 1 x 8 accumulated" in cluster.log(cluster.job("one"))
    near(cluster.losses("one"), uninterrupted_losses, 3e-6)
    stdout = cluster.submit("action=status", "run=one").stdout
    assert "one: job" in stdout
    assert "COMPLETED" in stdout
    assert "run is finished at step 60 of 60" in stdout
    assert "step 60/60" in cluster.submit("action=logs", "run=one").stdout


def test_a_job_that_is_preempted_and_loses_a_rank_ends_with_the_losses_of_an_uninterrupted_run(
    cluster: Cluster, training: list[str], uninterrupted_losses: list[float]
) -> None:
    cluster.submit(*training, "run=preempted")
    job = cluster.job("preempted")
    cluster.wait_for_step("preempted", 8)
    resubmitted = cluster.submit(*training, "run=preempted", check=False)
    assert resubmitted.returncode == 2
    assert f"submitted already: preempted (job {job}, RUNNING)" in resubmitted.stderr
    cluster.slurm("scontrol", "requeue", job)
    cluster.wait(job, "PENDING")
    num_steps = len(cluster.rows("preempted"))
    assert 8 <= num_steps < STEPS
    status = json.loads((cluster.folder / "runs/preempted/status.json").read_text())
    assert (status["state"], status["step"], status["message"]) == ("stopped", num_steps, "SIGTERM")
    cluster.wait(job, "RUNNING")
    cluster.wait_for_step("preempted", num_steps + 5)
    ranks = [
        process
        for process in psutil.process_iter()
        if "runs/preempted/config.yaml" in _command_line(process) and "python" in process.name()
    ]
    assert len(ranks) == 2
    ranks[0].kill()
    cluster.wait(job, "PENDING")
    assert ": requeued\n" in cluster.log(job)
    assert re.search(r"task \d: Exited with exit code 1\n", cluster.log(job))
    cluster.wait(job, "COMPLETED")
    assert cluster.losses("preempted") == uninterrupted_losses


def _command_line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


def test_a_job_at_its_time_limit_is_requeued_until_a_stop_file_ends_it(
    cluster: Cluster, training: list[str], uninterrupted_losses: list[float]
) -> None:
    # Slurm checks time limits every 30 s, so the signal comes 60 to 90 s after the start, when training has begun.
    cluster.submit(*training, "run=limited", "optim.steps=9999", "cluster.time=00:02:00", "cluster.signal_seconds=60")
    job = cluster.job("limited")
    cluster.wait(job, "RUNNING")
    cluster.wait(job, "PENDING")
    status = json.loads((cluster.folder / "runs/limited/status.json").read_text())
    assert (status["exit_code"], status["message"]) == (75, "SIGUSR1")
    cluster.wait(job, "RUNNING")
    cluster.wait_for_step("limited", status["step"] + 3)
    (cluster.folder / "runs/limited/STOP").touch()
    cluster.wait(job, "FAILED")
    assert "ExitCode=76:0" in cluster.slurm("scontrol", "show", "job", job)
    assert cluster.losses("limited")[:STEPS] == uninterrupted_losses[: len(cluster.rows("limited"))]


def test_a_chain_of_jobs_replaces_requeueing(
    cluster: Cluster, training: list[str], uninterrupted_losses: list[float]
) -> None:
    cluster.submit(*training, "run=chain", "cluster.requeue=false", "cluster.chain=3")
    first, second, third = (cluster.job("chain", index) for index in range(3))
    cluster.wait_for_step("chain", 5)
    # The signal that Slurm sends at the time limit.
    cluster.slurm("scancel", "--signal=USR1", first)
    cluster.wait(first, "FAILED")
    cluster.wait(second, "COMPLETED")
    cluster.wait(third, "COMPLETED")
    assert "an earlier job of this chain exited with code 0: nothing to do" in cluster.log(third)
    assert cluster.losses("chain") == uninterrupted_losses


def test_a_pipeline_is_a_chain_of_jobs(cluster: Cluster, training: list[str], base_tokenizer: Path) -> None:
    keys = ", ".join(f"'{override}'" for override in training[1:-2])
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
    jobs = [cluster.job("way", index) for index in range(3)]
    for job in jobs:
        cluster.wait(job, "COMPLETED")
    assert (cluster.folder / "runs/way/sft/export/model.safetensors").exists()
    stdout = cluster.submit("action=status", "run=way").stdout
    assert [line.split(":")[0] for line in stdout.splitlines()] == ["prepare", "train", "export"]
    assert "every stage is complete; nothing to submit" in cluster.submit(*arguments).stdout


def test_two_nodes_prepare_one_store_though_one_is_killed(
    cluster: Cluster, verbs_of, base_tokenizer: Path, tmp_path: Path
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    for number in range(40):
        lines = [json.dumps({"text": f"{number} {text}"}) for text in ENGLISH * 20]
        (texts / f"{number:02}.jsonl").write_text("\n".join(lines) + "\n")
    words = [f"data={texts}", f"tokenizer={base_tokenizer}", "workers=1"]
    verbs_of(tmp_path)("prepare", *words, "out=alone")
    together = cluster.folder / "together"
    cluster.submit(
        "verb=prepare", "run=shared", "cluster=slurm_cpu", "cluster.nodes=2", *words, f"out={together}",
        "lost_after_seconds=5",
    )  # fmt: skip
    job = cluster.job("shared")
    deadline = time.monotonic() + TIMEOUT_SECONDS
    second: list[psutil.Process] = []
    while not second or len(list(cluster.folder.glob(".together.claims/*.claim"))) < 4:
        assert time.monotonic() < deadline, cluster.log(job)
        second = [process for process in psutil.process_iter() if _is_second_node(process)]
        time.sleep(0.02)
    for process in second:
        process.kill()
    cluster.wait(job, "COMPLETED")
    files = [file.relative_to(together) for file in together.rglob("*") if file.is_file() and file.name[0] != "."]
    assert len(files) > 120
    assert all((together / file).read_bytes() == (tmp_path / "alone" / file).read_bytes() for file in files)
    assert "a process was lost: one finishes what is left" in cluster.log(job)


def _is_second_node(process: psutil.Process) -> bool:
    try:
        is_python = "launch/prepare.py" in _command_line(process) and "python" in process.name()
        return is_python and process.environ().get("SLURM_PROCID") == "1"
    except psutil.Error:
        return False


def test_a_submission_that_slurm_rejects_leaves_no_run_folder_and_no_job(cluster: Cluster, training: list[str]) -> None:
    for option, expected in (
        ("cluster.partition=nope", r"[Ii]nvalid partition.*\. Give cluster\.partition="),
        ("cluster.gpu=H100", r"gres.*\. This cluster .*cluster\.sbatch=--gres=gpu:8"),
        ("cluster.constraint=a100", r"Invalid feature.*\. Give another cluster\.constraint"),
    ):
        completed = cluster.submit(*training, "run=refused", option, check=False)
        assert completed.returncode == 2
        assert re.search(expected, completed.stderr), completed.stderr
    assert not (cluster.folder / "runs" / "refused").exists()
    assert "refused" not in cluster.slurm("squeue", "--format=%j")


def test_a_job_waits_for_a_drained_node(cluster: Cluster, training: list[str]) -> None:
    cluster.slurm("scontrol", "update", "NodeName=n2", "State=DRAIN", "Reason=test")
    try:
        cluster.submit(*training, "run=waits")
        assert cluster.state(cluster.job("waits")) == "PENDING"
        cluster.submit("action=cancel", "run=waits")
    finally:
        cluster.slurm("scontrol", "update", "NodeName=n2", "State=RESUME")
    completed = cluster.submit(*training, "run=large", "cluster.nodes=4", check=False)
    assert "compare cluster.nodes" in completed.stderr
    assert not (cluster.folder / "runs" / "large").exists()


def test_cancelling_saves_a_checkpoint_and_does_not_requeue(cluster: Cluster, training: list[str]) -> None:
    cluster.submit(*training, "run=ended", "optim.steps=9999")
    job = cluster.job("ended")
    cluster.wait_for_step("ended", 3)
    assert f"cancelled: ended (job {job})" in cluster.submit("action=cancel", "run=ended").stdout
    cluster.wait(job, "CANCELLED")
    deadline = time.monotonic() + TIMEOUT_SECONDS
    while (status := json.loads((cluster.folder / "runs/ended/status.json").read_text()))["state"] == "running":
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert (status["state"], status["message"]) == ("stopped", "SIGTERM")
    time.sleep(1)
    assert cluster.state(job) == "CANCELLED"


def test_a_killed_study_of_jobs_resumes(cluster: Cluster, training: list[str]) -> None:
    """Two trials at a time, one node each; the trial with the smallest learning rate is pruned."""
    study = ["study=lr", "sweep.space.optim.lr={choices: [1e-3, 3e-4, 1e-9]}", "sweep.sampler=grid", "sweep.parallel=2"]
    study += [
        "sweep.poll_seconds=0.2",
        "sweep.startup_trials=2",
        "sweep.warmup_steps=10",
        *training[1:-1],
        "cluster.nodes=1",
    ]
    command = [sys.executable, str(ROOT / "launch" / "sweep.py"), *study]
    environment = os.environ | cluster.variables
    with (cluster.folder / "sweep.log").open("w") as log:
        sweep_process = subprocess.Popen(command, cwd=cluster.folder, env=environment, stdout=log, stderr=log)
        cluster.wait_for_step("lr/trial-0001", 3)
        sweep_process.kill()
        sweep_process.wait()
        assert (
            subprocess.run(command, cwd=cluster.folder, env=environment, stdout=log, stderr=log, timeout=180).returncode
            == 0
        )
    stdout = (cluster.folder / "sweep.log").read_text()
    assert [stdout.count(f"trial {number}: starts") for number in range(3)] == [1, 1, 1]
    assert "trial 2: pruned at step" in stdout
    jobs = [cluster.job(f"lr/trial-{number:04d}") for number in range(3)]
    assert len({*jobs}) == 3
    assert [cluster.state(job) for job in jobs] == ["COMPLETED", "COMPLETED", "FAILED"]
    assert len(cluster.rows("lr/trial-0002")) < STEPS
    losses = [cluster.losses(f"lr/trial-{number:04d}") for number in range(2)]
    assert [len(trial_losses) for trial_losses in losses] == [STEPS, STEPS]
    assert losses[0][-1] < losses[1][-1]
    assert "best: trial 0, loss" in stdout
    assert (cluster.folder / "runs/lr/parallel_coordinates.png").exists()
