"""Triton's kernels compile for every generation without a GPU: tensor cores used, shared memory kept, nothing
spilled."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parents[1]
# Bytes of shared memory that a block may take.
SHARED = {70: 98_304, 75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}


def _compile(capability: int, what: str, cache: Path) -> dict[str, dict[str, int]]:
    paths = os.pathsep.join([str(HERE.parent / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    done = subprocess.run(
        [sys.executable, str(HERE / "support" / "compile_kernels.py"), str(capability), what],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {name: row for line in done.stdout.splitlines() for name, row in json.loads(line).items()}


def _check_attention(capability: int, head_dims: str, cache: Path) -> None:
    rows = _compile(capability, head_dims, cache)
    assert len(rows) == 6 * len(head_dims.split(","))
    for name, row in rows.items():
        # Two products a block of scores forward, three for queries, four for keys; each is many instructions.
        assert row["products"] >= 8, (capability, name, row)
        assert row["spilled"] == 0, (capability, name, row)
        assert row["shared"] <= SHARED[capability], (capability, name, row)


def test_attention_at_the_usual_head_size(tmp_path: Path) -> None:
    _check_attention(90, "128", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_attention_at_every_head_size(capability: int, tmp_path: Path) -> None:
    _check_attention(capability, "64,80,128,256", tmp_path)


@pytest.mark.parametrize(
    "capability", [70, 90, *(pytest.param(each, marks=pytest.mark.slow) for each in (75, 80, 86, 89))]
)
def test_elementwise_kernels(capability: int, tmp_path: Path) -> None:
    rows = _compile(capability, "elementwise", tmp_path)
    assert len(rows) == 6
    for name, row in rows.items():
        assert row["products"] == 0, name
        assert row["spilled"] == 0, (capability, name, row)
        assert row["shared"] <= SHARED[capability], (capability, name, row)
