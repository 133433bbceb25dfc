"""Benchmarks that reach into the verbs still run, and compare like with like."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
from grid import ROOT

pytestmark = [pytest.mark.slow, pytest.mark.data]


def test_training_beside_peers_sees_the_same_tokens_and_losses(data_folder: Path, tmp_path: Path) -> None:
    words = [sys.executable, ROOT / "benchmarks" / "bench_train.py", data_folder, tmp_path, "--quick"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    (table,) = tmp_path.glob("train_cpu*.csv")
    with table.open(encoding="utf-8") as stream:
        turns = {row["contender"]: row for row in csv.DictReader(stream)}
    ours = turns["ours"]
    for peer in ("HF Trainer, padded", "HF Trainer, packed by position_ids"):
        assert turns[peer]["learned_tokens"] == ours["learned_tokens"]
        assert float(turns[peer]["last_loss"]) == pytest.approx(float(ours["last_loss"]), abs=2e-4)
