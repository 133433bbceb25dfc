"""A run that is asked to stop, or killed, goes on by the same command with the same losses."""

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
from tiny_run import prepare_store, tiny_keys
from wandb_file import finished, history, records

from fireflyds.checkpoint import shard_files
from fireflyds.distributed.launcher_env import free_port

ROOT = Path(__file__).parents[2]
STEPS = 60


@pytest.fixture
def arguments(verb, tmp_path: Path, base_tokenizer: Path) -> list[str]:
    prepare_store(verb, tmp_path, base_tokenizer, ENGLISH * 4)
    return [
        *tiny_keys(base_tokenizer),
        f"optim.steps={STEPS}",
        "optim.lr=1e-3",
        "seq_len=256",
        "micro_batch_size=1",
        "global_batch_size=4",
        "checkpoint.every=5",
        "log_every=5",
    ]


def start(tmp_path: Path, *arguments: str) -> subprocess.Popen[bytes]:
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    words = ["deepspeed", "--num_gpus", "2", str(ROOT / "launch" / "train.py"), *arguments]
    with (tmp_path / "out.log").open("ab") as log:
        return subprocess.Popen(words, cwd=tmp_path, env=environment, stdout=log, stderr=log, start_new_session=True)


def rows(tmp_path: Path, run: str) -> list[dict]:
    file = tmp_path / "runs" / run / "metrics.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
        if file.exists()
        else []
    )


def wait_for_step(tmp_path: Path, run: str, step: int, process: subprocess.Popen[bytes]) -> None:
    until = time.monotonic() + 120
    while not any(row["step"] >= step for row in rows(tmp_path, run)):
        assert process.poll() is None, (tmp_path / "out.log").read_text()[-3000:]
        assert time.monotonic() < until
        time.sleep(0.02)


def contents(folder: Path) -> dict[str, str]:
    """Names of all files, and what the checkpoints hold."""
    return {
        str(file.relative_to(folder)): file.read_text() if file.name == "checksums.json" else ""
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def start_ranks(tmp_path: Path, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """Two ranks without a launcher: nobody but themselves sees that one is gone."""
    here = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "LOCAL_WORLD_SIZE": "2"}
    words = [sys.executable, str(ROOT / "launch" / "train.py"), *arguments]
    with (tmp_path / "out.log").open("ab") as log:
        return [
            subprocess.Popen(
                words,
                cwd=tmp_path,
                env=os.environ | here | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=log,
                stderr=log,
            )
            for rank in (0, 1)
        ]


@pytest.mark.chaos
def test_a_run_killed_twenty_times_ends_as_if_undisturbed(arguments: list[str], tmp_path: Path) -> None:
    """Killed at random moments, whole or one rank of it; with a save at every step many of them are in the middle of
    one."""
    arguments = [argument.replace("checkpoint.every=5", "checkpoint.every=1") for argument in arguments]
    assert [each.wait(200) for each in start_ranks(tmp_path, "run=whole", *arguments)] == [0, 0]
    chance = random.Random(7)
    for _ in range(20):
        ranks = start_ranks(tmp_path, "run=killed", *arguments)
        done = len(rows(tmp_path, "killed"))
        wait_for_step(tmp_path, "killed", min(done + chance.randint(1, 2), STEPS - 6), ranks[0])
        time.sleep(chance.random() * 0.05)
        for each in ranks if chance.random() < 0.5 else [chance.choice(ranks)]:
            each.kill()
        assert all(each.wait(60) != 0 for each in ranks)
        assert not list((tmp_path / "runs" / "killed" / "checkpoints").glob("step-*")) or not damaged(tmp_path)
    assert [each.wait(200) for each in start_ranks(tmp_path, "run=killed", *arguments)] == [0, 0]
    assert [row["step"] for row in rows(tmp_path, "killed")] == list(range(1, STEPS + 1))
    assert [row["loss"] for row in rows(tmp_path, "killed")] == [row["loss"] for row in rows(tmp_path, "whole")]
    whole, killed = (contents(tmp_path / "runs" / name) for name in ("whole", "killed"))
    assert killed.keys() == whole.keys()
    last = "checkpoints/step-000060"
    for file in ("rank-00000.safetensors", "rank-00001.safetensors"):
        found = [(tmp_path / "runs" / name / last / file).read_bytes() for name in ("whole", "killed")]
        assert found[0] == found[1]


def ranks_of(process: subprocess.Popen[bytes]) -> list[int]:
    found = psutil.Process(process.pid).children(recursive=True)
    return [each.pid for each in found if any("--local_rank" in word for word in each.cmdline())]


def damaged(tmp_path: Path) -> list[str]:
    """Checkpoints that bear their name and are not whole."""
    folder = tmp_path / "runs" / "killed" / "checkpoints"
    return [wrong for path in folder.glob("step-*") if (wrong := shard_files.find_corruption(path))]


@pytest.mark.chaos
def test_preparing_killed_at_random_moments_ends_in_the_same_store(tmp_path: Path, base_tokenizer: Path) -> None:
    for number in range(6):
        (tmp_path / f"part{number}.txt").write_text(
            "\n".join(f"{number} {line}" for line in ENGLISH * 200), encoding="utf-8"
        )
    words = [
        sys.executable,
        str(ROOT / "launch" / "prepare.py"),
        "data=part*.txt",
        f"tokenizer={base_tokenizer}",
        "workers=2",
    ]
    subprocess.run([*words, "out=whole"], cwd=tmp_path, check=True, capture_output=True)
    chance = random.Random(3)
    for _ in range(5):
        process = subprocess.Popen(
            [*words, "out=killed"],
            cwd=tmp_path,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(1.5 + 3 * chance.random())
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    subprocess.run([*words, "out=killed"], cwd=tmp_path, check=True, capture_output=True)
    whole, killed = (
        {str(f.relative_to(tmp_path / name)): f.read_bytes() for f in (tmp_path / name).rglob("*") if f.is_file()}
        for name in ("whole", "killed")
    )
    assert killed.keys() == whole.keys()
    assert all(killed[name] == whole[name] for name in whole if name.startswith(("parts", "index")))


@pytest.mark.slow
def test_sigterm_saves_and_leaves_with_its_own_code(verb, arguments: list[str], tmp_path: Path) -> None:
    words = [sys.executable, str(ROOT / "launch" / "train.py"), "run=asked", *arguments]
    with (tmp_path / "out.log").open("wb") as log:
        process = subprocess.Popen(words, cwd=tmp_path, stdout=log, stderr=log)
    wait_for_step(tmp_path, "asked", 8, process)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 75
    output = (tmp_path / "out.log").read_text()
    assert "Traceback" not in output
    found = re.search(r"stopped at step (\d+) \(SIGTERM\), checkpoint saved", output)
    assert found
    assert len(rows(tmp_path, "asked")) == int(found.group(1)) < STEPS
    done = verb("train", "run=asked", *arguments)
    assert f"resumed at step {found.group(1)}" in done.stderr
    assert len(rows(tmp_path, "asked")) == STEPS
    again = verb("train", "run=asked", *arguments)
    assert "nothing left to do" in again.stderr
    assert len(rows(tmp_path, "asked")) == STEPS


def status_of(tmp_path: Path, run: str) -> dict:
    return json.loads((tmp_path / "runs" / run / "status.json").read_text())


def wait_for_state(tmp_path: Path, run: str, state: str) -> dict:
    until = time.monotonic() + 60
    while (found := status_of(tmp_path, run))["state"] != state:
        assert time.monotonic() < until, (found, (tmp_path / "out.log").read_text()[-3000:])
        time.sleep(0.1)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("who", ["deepspeed", "deepspeed.launcher.launch"])
def test_ranks_whose_launcher_is_gone_save_and_leave(arguments: list[str], tmp_path: Path, who: str) -> None:
    """DeepSpeed's runner passes no signal on."""
    endless = [argument.replace(f"optim.steps={STEPS}", "optim.steps=100000") for argument in arguments]
    process = start(tmp_path, "run=left", *endless)
    wait_for_step(tmp_path, "left", 6, process)
    ranks, runner = ranks_of(process), psutil.Process(process.pid)
    launcher = next(each for each in runner.children() if "deepspeed.launcher.launch" in each.cmdline())
    (runner if who == "deepspeed" else launcher).send_signal(signal.SIGTERM if who == "deepspeed" else signal.SIGKILL)
    found = wait_for_state(tmp_path, "left", "stopped")
    process.wait(60)
    assert found["exit_code"] == 75
    assert f"the launcher (process {(runner if who == 'deepspeed' else launcher).pid}) is gone" in found["message"]
    _, alive = psutil.wait_procs([psutil.Process(pid) for pid in ranks if psutil.pid_exists(pid)], timeout=60)
    assert not alive
    assert len(rows(tmp_path, "left")) == found["step"] >= 6
    folders = [path.name for path in (tmp_path / "runs" / "left" / "checkpoints").glob("step-*")]
    assert f"step-{found['step']:06d}" in folders


@pytest.mark.slow
def test_a_dead_rank_ends_the_others_by_name(arguments: list[str], tmp_path: Path) -> None:
    endless = [argument.replace(f"optim.steps={STEPS}", "optim.steps=100000") for argument in arguments]
    process = start(tmp_path, "run=lost", *endless)
    wait_for_step(tmp_path, "lost", 6, process)
    victim = next(pid for pid in ranks_of(process) if "--local_rank=1" in psutil.Process(pid).cmdline())
    os.kill(victim, signal.SIGKILL)
    assert process.wait(60) != 0
    said = f"rank 1 on {socket.gethostname()} died (process {victim}, "
    assert said in status_of(tmp_path, "lost")["message"]
    assert status_of(tmp_path, "lost")["state"] == "failed"
    output = (tmp_path / "out.log").read_text()
    assert f"error: {said}" in output
    assert "its log: runs/lost/logs/rank_1.log" in output


@pytest.mark.slow
def test_files_in_its_folder_ask_a_run_to_save_and_to_stop(arguments: list[str], tmp_path: Path) -> None:
    endless = [argument.replace(f"optim.steps={STEPS}", "optim.steps=100000") for argument in arguments]
    process = start(
        tmp_path, "run=asked", *[each.replace("checkpoint.every=5", "checkpoint.every=99999") for each in endless]
    )
    wait_for_step(tmp_path, "asked", 3, process)
    folder = tmp_path / "runs" / "asked"
    assert not list((folder / "checkpoints").glob("step-*"))
    (folder / "SAVE").touch()
    until = time.monotonic() + 60
    while not list((folder / "checkpoints").glob("step-*")):
        assert time.monotonic() < until
        time.sleep(0.05)
    assert not (folder / "SAVE").exists()
    assert process.poll() is None
    (folder / "STOP").touch()
    process.wait(60)
    assert status_of(tmp_path, "asked")["message"] == "STOP file"
    assert status_of(tmp_path, "asked")["exit_code"] == 76


@pytest.mark.slow
def test_a_spike_goes_back_and_passes_over_its_data(arguments: list[str], tmp_path: Path) -> None:
    """Nothing is learnt, so the loss goes up and down with the documents."""
    still = [argument.replace("optim.lr=1e-3", "optim.lr=1e-9") for argument in arguments]
    words = [
        sys.executable,
        str(ROOT / "launch" / "train.py"),
        "run=spiky",
        *still,
        "recovery.rollback_above=1.00005",
        "recovery.max_rollbacks=1",
    ]
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True, timeout=280)
    assert done.returncode == 2, done.stderr[-3000:]
    found = re.search(
        r"step (\d+): loss [\d.]+ is a spike \(recovery.rollback_above\); rolled back to step (\d+), "
        r"the data of (\d+) steps",
        done.stderr,
    )
    assert found
    spike, back, passed = map(int, found.groups())
    assert spike - back == passed
    assert "recovery.max_rollbacks=1: the loss spikes again after 1 rollbacks" in done.stderr
    steps = [row["step"] for row in rows(tmp_path, "spiky")]
    assert steps == list(range(1, len(steps) + 1))


@pytest.mark.slow
def test_wandb_offline_keeps_one_run_of_rank_zero(verb, arguments: list[str], tmp_path: Path) -> None:
    short = [argument.replace(f"optim.steps={STEPS}", "optim.steps=3") for argument in arguments]
    verb(
        "train",
        "run=tracked",
        *short,
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
    out = verb("export", "run=tracked", "artifact=true").stdout
    assert "is the artifact tracked of its W&B run" in out
    again = set((tmp_path / "runs" / "tracked").glob("wandb/offline-run-*/*.wandb")) - set(files)
    sent = [
        record.artifact for record in records(finished(again.pop())) if record.WhichOneof("record_type") == "artifact"
    ]
    assert sent[0].run_id == files[0].stem.removeprefix("run-")
    assert "model.safetensors" in [content.path for content in sent[0].manifest.contents]
    refused = verb("export", "run=asked_nothing", "artifact=true", check=False)
    assert refused.returncode == 2
