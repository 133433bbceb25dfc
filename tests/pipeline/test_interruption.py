"""A run that is asked to stop, or killed, goes on by the same command with the same losses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from samples import ENGLISH
from wandb_file import finished, history, records

ROOT = Path(__file__).parents[2]
STEPS = 60


@pytest.fixture
def arguments(verb, tmp_path: Path, base_tokenizer: Path) -> list[str]:
    (tmp_path / "en.txt").write_text("\n".join(ENGLISH * 4), encoding="utf-8")
    verb("prepare", "data=en.txt", f"tokenizer={base_tokenizer}", "out=store", "workers=1")
    return [
        "data=store", "model=at_path", "model.init=scratch", f"model.tokenizer={base_tokenizer}", f"optim.steps={STEPS}", "optim.lr=1e-3",
        "model.architecture={model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2}",
        "seq_len=256", "micro_batch_size=1", "global_batch_size=4", "checkpoint.every=5", "log_every=5",
    ]  # fmt: skip


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


@pytest.mark.chaos
def test_killed_runs_go_on_with_the_same_losses(arguments: list[str], tmp_path: Path) -> None:
    assert start(tmp_path, "run=whole", *arguments).wait(200) == 0
    for step in (7, 23, 40):
        process = start(tmp_path, "run=killed", *arguments)
        wait_for_step(tmp_path, "killed", step, process)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        time.sleep(0.5)
    assert start(tmp_path, "run=killed", *arguments).wait(200) == 0
    assert [row["loss"] for row in rows(tmp_path, "killed")] == [row["loss"] for row in rows(tmp_path, "whole")]
    assert [row["step"] for row in rows(tmp_path, "killed")] == list(range(1, STEPS + 1))
    folders = [path.name for path in (tmp_path / "runs" / "killed" / "checkpoints").iterdir() if path.is_dir()]
    assert sorted(folders) == ["step-000055", "step-000060"]


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
    found = re.search(r"stopped at step (\d+), checkpoint saved", output)
    assert found
    assert len(rows(tmp_path, "asked")) == int(found.group(1)) < STEPS
    done = verb("train", "run=asked", *arguments)
    assert f"resumed at step {found.group(1)}" in done.stderr
    assert len(rows(tmp_path, "asked")) == STEPS
    again = verb("train", "run=asked", *arguments)
    assert "nothing left to do" in again.stderr
    assert len(rows(tmp_path, "asked")) == STEPS


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
