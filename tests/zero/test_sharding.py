"""ZeRO-3 shards parameters as they are read: no rank holds the whole model, and none moves it as a whole."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

ROOT = Path(__file__).parents[2]
SIZES = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 24, "num_attention_heads": 8}
VOCAB = 2048
# What grows beside tensors.
SLACK = 8 << 20


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "base"
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, **SIZES))
    model.save_pretrained(folder, max_shard_size="100MB")
    return folder


def _run(base: Path, out: Path, ranks: int, *overrides: str) -> list[dict]:
    script = str(ROOT / "tests" / "support" / "shard_memory.py")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(ranks), "--standalone"]
    ended = subprocess.run(
        [*launcher, script, str(base), str(out), *overrides],
        # Every tensor is mapped by itself, so that what is freed is returned: glibc keeps up to the whole model.
        env=os.environ | {"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", "MALLOC_MMAP_THRESHOLD_": "65536"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return [json.loads(Path(f"{out}.{rank}.json").read_text(encoding="utf-8")) for rank in range(ranks)]


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_a_rank_holds_its_share_and_one_tensor(base: Path, tmp_path: Path, ranks: int) -> None:
    weights = {}
    for file in base.glob("*.safetensors"):
        weights |= load_file(file)
    model_bytes = sum(2 * tensor.numel() for tensor in weights.values())
    largest = max(tensor.numel() for tensor in weights.values())
    assert model_bytes > 4 * SLACK
    results = _run(base, tmp_path / "out", ranks)
    for result in results:
        assert result["built"] < SLACK
        # One tensor as it is read, in 16 bits, and as it is cut into shards.
        assert result["peak"] < model_bytes / ranks + (4 + 2) * largest + SLACK
        assert result["largest_moved"] < 2 * largest
    # The shards of all ranks together are the weights of the files, in 16 bits.
    for name, tensor in weights.items():
        total = sum(result["sums"][name] for result in results)
        expected = tensor.bfloat16().float()
        assert total == pytest.approx(float(expected.sum()), abs=1e-4 * float(expected.abs().sum()))


@pytest.mark.slow
def test_a_quantised_base_is_sharded_as_it_is_read(base: Path, tmp_path: Path) -> None:
    quantised_bytes = 24 * (4 * 512 * 512 + 3 * 512 * 1408) // 2
    results = _run(base, tmp_path / "out", 2, "tuning=qlora", "tuning.r=4")
    adapters = 24 * 4 * (4 * (512 + 512) + 3 * (512 + 1408))
    for result in results:
        assert result["built"] < 4 * adapters + SLACK
        assert result["peak"] < 4 * adapters + quantised_bytes / 2 + 2 * 2 * VOCAB * 512 + 12 * VOCAB * 512 + 2 * SLACK
        assert result["largest_moved"] < 2 * VOCAB * 512
