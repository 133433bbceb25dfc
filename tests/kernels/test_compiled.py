"""Triton's kernels compile for every GPU generation without a GPU: tensor cores used, shared memory within limits, no
spills."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
# Bytes of shared memory that a block may take.
SHARED_MEMORY_BYTES = {70: 98_304, 75: 65_536, 80: 166_912, 86: 101_376, 89: 101_376, 90: 232_448}


def _compile(capability: int, kernels: str, cache: Path) -> dict[str, dict[str, int]]:
    paths = os.pathsep.join([str(TESTS.parent / "kernels"), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache), "PYTHONPATH": paths}
    completed = subprocess.run(
        [sys.executable, str(TESTS / "support" / "compile_kernels.py"), str(capability), kernels],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert completed.returncode == 0, completed.stderr[-3000:]
    return {name: row for line in completed.stdout.splitlines() for name, row in json.loads(line).items()}


def _check_attention(capability: int, head_dims: str, cache: Path) -> None:
    rows = _compile(capability, head_dims, cache)
    assert len(rows) == 6 * len(head_dims.split(","))
    for name, row in rows.items():
        # Two products a block of scores forward, three for queries, four for keys; each is many instructions.
        assert row["products"] >= 8, (capability, name, row)
        assert row["spilled"] == 0, (capability, name, row)
        assert row["shared"] <= SHARED_MEMORY_BYTES[capability], (capability, name, row)


def test_attention_kernels_compile_at_head_dim_128(tmp_path: Path) -> None:
    _check_attention(90, "128", tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_attention_kernels_compile_at_every_head_dim(capability: int, tmp_path: Path) -> None:
    _check_attention(capability, "64,80,128,256", tmp_path)


@pytest.mark.parametrize(
    "capability",
    [70, 90, *(pytest.param(older_capability, marks=pytest.mark.slow) for older_capability in (75, 80, 86, 89))],
)
def test_elementwise_kernels_compile(capability: int, tmp_path: Path) -> None:
    # In bfloat16 below sm_80 too, where the dispatch refuses them: not every Triton that is supported compiles them.
    rows = _compile(capability, "elementwise", tmp_path)
    assert len(rows) == 12
    for name, row in rows.items():
        assert row["products"] == 0, name
        assert row["spilled"] == 0, (capability, name, row)
        assert row["shared"] <= SHARED_MEMORY_BYTES[capability], (capability, name, row)
