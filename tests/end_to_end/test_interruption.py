"""A run that is stopped or killed resumes by the same command with the same losses."""

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from samples import ENGLISH
from tiny_run import prepare_store, short_run_keys
from wandb_file import finished, history, records

from fireflyds.checkpoint import shard_files
from fireflyds.distributed.launcher_env import free_port

ROOT = Path(__file__).parents[2]
STEPS = 60


@pytest.fixture
def arguments(verb, tmp_path: Path, base_tokenizer: Path) -> list[str]:
    prepare_store(verb, tmp_path, base_tokenizer, ENGLISH * 4)
    return [
        *short_run_keys(base_tokenizer, STEPS, 5),
    ]


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    command = ["deepspeed", "--num_gpus", "2", str(ROOT / "launch" / "train.py"), *arguments]
    with (tmp_path / "out.log").open("ab") as log:
        return subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)


def rows(tmp_path: Path, run: str) -> list[dict]:
    file = tmp_path / "runs" / run / "metrics.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if file.exists()
        else []
    )


def wait_for_step(tmp_path: Path, run: str, step: int, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not any(row["step"] >= step for row in rows(tmp_path, run)):
        assert process.poll() is None, (tmp_path / "out.log").read_text()[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def contents(folder: Path) -> dict[str, str]:
    """Names of all files, and the checksums of checkpoints."""
    return {
        str(file.relative_to(folder)): file.read_text() if file.name == "checksums.json" else ""
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def start_ranks(tmp_path: Path, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """Two ranks without a launcher: only the ranks themselves can detect a dead one."""
    environment = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "LOCAL_WORLD_SIZE": "2",
    }
    command = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments]
    with (tmp_path / "out.log").open("ab") as log:
        return [
            subprocess.Popen(
                command,
                cwd=tmp_path,
                env=os.environ | environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank in (0, 1)
        ]


@pytest.mark.chaos
def test_a_run_killed_twenty_times_ends_as_an_uninterrupted_one(arguments: list[str], tmp_path: Path) -> None:
    """All ranks or one of them are killed at random times, often during one of the checkpoints of every step."""
    arguments = [argument.replace("checkpoint.every=5", "checkpoint.every=1") for argument in arguments]
    assert [process.wait(200) for process in start_ranks(tmp_path, "run=whole", *arguments)] == [0, 0]
    rng = random.Random(7)
    for _ in range(20):
        ranks = start_ranks(tmp_path, "run=killed", *arguments)
        num_steps = len(rows(tmp_path, "killed"))
        wait_for_step(tmp_path, "killed", min(num_steps + rng.randint(1, 2), STEPS - 6), ranks[0])
        time.sleep(rng.random() * 0.05)
        for process in ranks if rng.random() < 0.5 else [rng.choice(ranks)]:
            process.kill()
        assert all(process.wait(60) != 0 for process in ranks)
        assert not list((tmp_path / "runs" / "killed" / "checkpoints").glob("step-*")) or not damaged(tmp_path)
    assert [process.wait(200) for process in start_ranks(tmp_path, "run=killed", *arguments)] == [0, 0]
    assert [row["step"] for row in rows(tmp_path, "killed")] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows(tmp_path, "killed")] == [row["loss"] for row in rows(tmp_path, "whole")]
    reference_contents, contents_after_kills = (contents(tmp_path / "runs" / name) for name in ("whole", "killed"))
    assert contents_after_kills.keys() == reference_contents.keys()
    last_checkpoint = "checkpoints/step-000060"
    for file in ("rank-00000.safetensors", "rank-00001.safetensors"):
        shards = [(tmp_path / "runs" / name / last_checkpoint / file).read_bytes() for name in ("whole", "killed")]
        assert shards[0] == shards[1]


def ranks_of(process: subprocess.Popen[bytes]) -> list[int]:
    children = psutil.Process(process.pid).children(recursive=True)
    return [child.pid for child in children if any("--local_rank" in argument for argument in child.cmdline())]


def damaged(tmp_path: Path) -> list[str]:
    """Corruption of checkpoints that have their final name."""
    folder = tmp_path / "runs" / "killed" / "checkpoints"
    return [corruption for path in folder.glob("step-*") if (corruption := shard_files.find_corruption(path))]


@pytest.mark.chaos
def test_prepare_killed_at_random_times_gives_the_same_store(tmp_path: Path, base_tokenizer: Path) -> None:
    for number in range(6):
        (tmp_path / f"part{number}.txt").write_text(
            "\n".join(f"{number} {line}" for line in ENGLISH * 200), encoding="utf-8"
        )
    command = [
        sys.executable,
        str(ROOT / "launch" / "prepare.py"),
        "data=part*.txt",
        f"tokenizer={base_tokenizer}",
        "workers=2",
    ]
    subprocess.run([*command, "out=whole"], cwd=tmp_path, check=True, capture_output=True)
    rng = random.Random(3)
    for _ in range(5):
        process = subprocess.Popen(
            [*command, "out=killed"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(1.5 + 3 * rng.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*command, "out=killed"], cwd=tmp_path, check=True, capture_output=True)
    reference_files, files_after_kills = (
        {
            str(file.relative_to(tmp_path / name)): file.read_bytes()
            for file in (tmp_path / name).rglob("*")
            if file.is_file()
        }
        for name in ("whole", "killed")
    )
    assert files_after_kills.keys() == reference_files.keys()
    assert all(
        files_after_kills[name] == reference_files[name]
        for name in reference_files
        if name.startswith(("parts", "index"))
    )


@pytest.mark.slow
def test_sigterm_saves_a_checkpoint_and_exits_with_code_75(verb, arguments: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "launch" / "train.py"), "run=asked", *arguments]
    with (tmp_path / "out.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log)
    wait_for_step(tmp_path, "asked", 8, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    output = (tmp_path / "out.log").read_text()
    assert "Traceback" not in output
    match = re.search(r"stopped at step (\d+) \(SIGTERM\), checkpoint saved", output)
    assert match
    assert len(rows(tmp_path, "asked")) == int(match.group(1)) < STEPS
    resumed = verb("train", "run=asked", *arguments)
    assert f"resumed at step {match.group(1)}" in resumed.stderr
    assert len(rows(tmp_path, "asked")) == STEPS
    finished_run = verb("train", "run=asked", *arguments)
    assert "nothing left to do" in finished_run.stderr
    assert len(rows(tmp_path, "asked")) == STEPS


def status_of(tmp_path: Path, run: str) -> dict:
    return json.loads((tmp_path / "runs" / run / "status.json").read_text())


def wait_for_state(tmp_path: Path, run: str, state: str) -> dict:
    deadline = time.monotonic() + 60
    while (status := status_of(tmp_path, run))["state"] != state:
        assert time.monotonic() < deadline, (status, (tmp_path / "out.log").read_text()[-3000:])
        time.sleep(0.1)
    return status


@pytest.mark.slow
@pytest.mark.parametrize("target", ["deepspeed", "deepspeed.launcher.launch"])
def test_ranks_whose_launcher_died_save_and_exit(arguments: list[str], tmp_path: Path, target: str) -> None:
    """DeepSpeed's runner does not forward signals."""
    endless_arguments = [argument.replace(f"optim.steps={STEPS}", "optim.steps=100000") for argument in arguments]
    process = start(tmp_path, "run=left", *endless_arguments)
    wait_for_step(tmp_path, "left", 6, process)
    ranks, runner = ranks_of(process), psutil.Process(process.pid)
    launcher = next(child for child in runner.children() if "deepspeed.launcher.launch" in child.cmdline())
    (runner if target == "deepspeed" else launcher).send_signal(
        signal.SIGTERM if target == "deepspeed" else signal.SIGKILL
    )
    status = wait_for_state(tmp_path, "left", "stopped")
    process.wait(60)
    assert status["exit_code"] == 75
    assert f"the launcher (process {(runner if target == 'deepspeed' else launcher).pid}) is gone" in status["message"]
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in ranks if psutil.pid_exists(pid)], timeout=60)
    assert not alive
    assert len(rows(tmp_path, "left")) == status["step"] >= 6
    folders = [path.name for path in (tmp_path / "runs" / "left" / "checkpoints").glob("step-*")]
    assert f"step-{status['step']:06d}" in folders


@pytest.mark.slow
def test_a_dead_rank_ends_the_others_and_is_named(arguments: list[str], tmp_path: Path) -> None:
    endless_arguments = [argument.replace(f"optim.steps={STEPS}", "optim.steps=100000") for argument in arguments]
    process = start(tmp_path, "run=lost", *endless_arguments)
    wait_for_step(tmp_path, "lost", 6, process)
    killed_pid = next(pid for pid in ranks_of(process) if "--local_rank=1" in psutil.Process(pid).cmdline())
    os.kill(killed_pid, signal.SIGKILL)
    assert process.wait(60) != 0
    message = f"rank 1 on {socket.gethostname()} died (process {killed_pid}, "
    assert message in status_of(tmp_path, "lost")["message"]
    assert status_of(tmp_path, "lost")["state"] == "failed"
    output = (tmp_path / "out.log").read_text()
    assert f"error: {message}" in output
    assert "its log: runs/lost/logs/rank_1.log" in output


@pytest.mark.slow
def test_save_and_stop_files_in_the_run_folder_save_and_stop_a_run(arguments: list[str], tmp_path: Path) -> None:
    endless_arguments = [argument.replace(f"optim.steps={STEPS}", "optim.steps=100000") for argument in arguments]
    process = start(
        tmp_path,
        "run=asked",
        *[override.replace("checkpoint.every=5", "checkpoint.every=99999") for override in endless_arguments],
    )
    wait_for_step(tmp_path, "asked", 3, process)
    folder = tmp_path / "runs" / "asked"
    assert not list((folder / "checkpoints").glob("step-*"))
    (folder / "SAVE").touch()
    deadline = time.monotonic() + 60
    while not list((folder / "checkpoints").glob("step-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert not (folder / "SAVE").exists()
    assert process.poll() is None
    (folder / "STOP").touch()
    process.wait(60)
    assert status_of(tmp_path, "asked")["message"] == "STOP file"
    assert status_of(tmp_path, "asked")["exit_code"] == 76


@pytest.mark.slow
def test_a_loss_spike_rolls_back_and_skips_its_data(arguments: list[str], tmp_path: Path) -> None:
    """The weights hardly change, so the loss varies with the documents alone."""
    constant_arguments = [argument.replace("optim.lr=1e-3", "optim.lr=1e-9") for argument in arguments]
    command = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        "run=spiky",
        *constant_arguments,
        "recovery.rollback_above=1.00005",
        "recovery.max_rollbacks=1",
    ]
    completed = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert completed.returncode == 2, completed.stderr[-3000:]
    match = re.search(
        r"step (\d+): loss [\d.]+ is a spike \(recovery.rollback_above\); rolled back to step (\d+), "
        r"the data of (\d+) steps",
        completed.stderr,
    )
    assert match
    spike_step, rollback_step, skipped_steps = map(int, match.groups())
    assert spike_step - rollback_step == skipped_steps
    assert "recovery.max_rollbacks=1: the loss spikes again after 1 rollbacks" in completed.stderr
    steps = [row["step"] for row in rows(tmp_path, "spiky")]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_wandb_offline_records_one_run_of_rank_zero(verb, arguments: list[str], tmp_path: Path) -> None:
    short_arguments = [argument.replace(f"optim.steps={STEPS}", "optim.steps=3") for argument in arguments]
    verb(
        "train",
        "run=tracked",
        *short_arguments,
        "tracking=wandb",
        "tracking.mode=offline",
        start=("deepspeed", "--num_gpus", "2"),
    )
    files = [finished(file) for file in (tmp_path / "runs" / "tracked").glob("wandb/offline-run-*/*.wandb")]
    assert len(files) == 1
    rows = [row for row in history(files[0]) if "loss" in row]
    assert [row["step"] for row in rows] == [1, 2, 3]
    keys = {
        "grad_norm",
        "tokens_per_second_per_gpu",
        "loss/text",
        "bits_per_byte",
        "lr/matrices",
        "slowest_rank",
        "fill",
    }
    assert all(keys <= set(row) for row in rows)
    assert all("mfu" not in row for row in rows)
    stdout = verb("export", "run=tracked", "artifact=true").stdout
    assert "is the artifact tracked of its W&B run" in stdout
    export_files = set((tmp_path / "runs" / "tracked").glob("wandb/offline-run-*/*.wandb")) - set(files)
    artifacts = [
        record.artifact
        for record in records(finished(export_files.pop()))
        if record.WhichOneof("record_type") == "artifact"
    ]
    assert artifacts[0].run_id == files[0].stem.removeprefix("run-")
    assert "model.safetensors" in [content.path for content in artifacts[0].manifest.contents]
    completed = verb("export", "run=asked_nothing", "artifact=true", check=False)
    assert completed.returncode == 2
