"""A study of real training runs on this machine, killed while it runs; on Slurm: test_slurm.py."""

import csv
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from grid import ROOT
from samples import ENGLISH
from tiny_run import prepare_store, tiny_keys

STEPS = 12


def start(folder: Path, arguments: list[str]) -> "subprocess.Popen[bytes]":
    with (folder / "sweep.log").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "launch" / "sweep.py"), *arguments],
            cwd=folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def wait_until(condition, seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_locked(file: Path) -> bool:
    with file.open("w") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def rows(run_dir: Path) -> list[dict]:
    file = run_dir / "metrics.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines(True) if line.endswith("\n")] if file.exists() else []
    )


@pytest.fixture
def arguments(verb, tmp_path: Path, base_tokenizer: Path) -> list[str]:
    prepare_store(verb, tmp_path, base_tokenizer, ENGLISH)
    return [
        "study=lr",
        "sweep=lr",
        "sweep.trials=3",
        "sweep.parallel=2",
        "sweep.poll_seconds=0.1",
        "sweep.pruner=none",
        "cluster=local_cpu",
        *tiny_keys(base_tokenizer),
        f"optim.steps={STEPS}",
        "seq_len=64",
        "global_batch_size=16",
        "checkpoint.every=3",
    ]


@pytest.mark.slow
def test_a_killed_study_and_a_killed_trial_resume(verb, arguments: list[str], tmp_path: Path) -> None:
    study = tmp_path / "runs" / "lr"
    sweep_process = start(tmp_path, arguments)
    wait_until(lambda: (study / "trial-0000/status.json").exists())
    sweep_process.send_signal(signal.SIGKILL)
    sweep_process.wait()
    trial_process = psutil.Process(int((study / "trial-0000/logs/launcher.pid").read_text()))
    assert trial_process.is_running()
    resumed_sweep = start(tmp_path, arguments)
    wait_until(lambda: is_locked(study / ".lock"))
    second_sweep = verb("sweep", *arguments, check=False)
    assert (second_sweep.returncode, "another process works on this study now" in second_sweep.stderr) == (2, True)
    wait_until(lambda: len(rows(study / "trial-0002")) >= 4)
    psutil.Process(int((study / "trial-0002/logs/launcher.pid").read_text())).kill()
    assert resumed_sweep.wait(180) == 0
    output = (tmp_path / "sweep.log").read_text()
    assert [output.count(f"trial {number}: starts with") for number in range(3)] == [1, 1, 1]
    assert output.count("starts again") == 1
    with (study / "trials.csv").open() as file:
        trials = list(csv.DictReader(file))
    assert [row["outcome"] for row in trials] == ["finished"] * 3
    for row in trials:
        metrics_rows = rows(tmp_path / "runs" / row["run"])
        assert [metrics_row["step"] for metrics_row in metrics_rows] == list(range(1, STEPS + 1))
        assert float(row["loss"]) == pytest.approx(metrics_rows[-1]["loss"], abs=1e-5)
    assert len({row["optim.lr"] for row in trials}) == 3
    best = min(trials, key=lambda row: float(row["loss"]))
    assert f"Trial {best['trial']} of lr" in (study / "best.yaml").read_text()


@pytest.mark.slow
def test_ctrl_c_lets_trials_save_and_the_study_resumes(arguments: list[str], tmp_path: Path) -> None:
    study = tmp_path / "runs" / "lr"
    arguments = [*arguments, "sweep.trials=1", "optim.steps=40", "checkpoint.every=999"]
    sweep_process = start(tmp_path, arguments)
    wait_until(lambda: len(rows(study / "trial-0000")) >= 3)
    sweep_process.send_signal(signal.SIGINT)
    assert sweep_process.wait(60) == 130
    status = json.loads((study / "trial-0000/status.json").read_text())
    assert (status["state"], status["exit_code"], status["message"]) == ("stopped", 75, "SIGTERM")
    assert start(tmp_path, arguments).wait(120) == 0
    assert "resumed at step" in (study / "trial-0000/logs/launcher.log").read_text()
    assert [row["step"] for row in rows(study / "trial-0000")] == list(range(1, 41))
