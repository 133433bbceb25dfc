import os
import socket
import subprocess
import sys

import pytest
import torch

from fireflyds import app
from fireflyds.config import Precision
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.errors import UserError
from fireflyds.zero import ds_config, engine


def _config(*overrides: str):
    return app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=3", *overrides])


def test_gradient_clipping_is_always_set() -> None:
    for norm in ("0", "0.3"):
        assert ds_config.build_ds_config(_config(f"optim.max_grad_norm={norm}"), Precision.fp32, 1)[
            "gradient_clipping"
        ] == float(norm)


def test_typed_and_extra_settings_reach_deepspeed() -> None:
    config = ds_config.build_ds_config(
        _config("zero=stage3", "zero.offload_param=cpu", "zero.extra.wall_clock_breakdown=true", "micro_batch_size=3"),
        Precision.bf16,
        4,
    )
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert config["wall_clock_breakdown"] is True
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (3, 4)
    assert config["bf16"]["enabled"]
    assert not config["fp16"]["enabled"]
    assert "scheduler" not in config
    assert "optimizer" not in config


def test_an_indivisible_global_batch_size_is_refused_with_the_nearest() -> None:
    assert _config("global_batch_size=8", "micro_batch_size=2").accumulation_steps(2) == 2
    with pytest.raises(UserError, match=r"global_batch_size=7: .*micro_batch_size=2 x 2 ranks = 4\. Nearest: 4"):
        _config("global_batch_size=7", "micro_batch_size=2").accumulation_steps(2)


def test_cores_are_shared_by_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.os, "sched_getaffinity", lambda process: set(range(16)))
    rank_info = RankInfo(0, 0, 64, "a", 1)
    assert engine.cpu_threads(rank_info, {}) == 1
    assert engine.cpu_threads(rank_info, {"LOCAL_WORLD_SIZE": "4"}) == 4
    assert engine.cpu_threads(rank_info, {"SLURM_NTASKS_PER_NODE": "2"}) == 8
    assert engine.cpu_threads(rank_info, {"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "6"}) == 3
    assert engine.cpu_threads(rank_info, {"SLURM_CPUS_PER_TASK": "12", "SLURM_NTASKS_PER_NODE": "2"}) == 12


def test_a_task_with_one_visible_gpu_uses_device_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    rank_info = RankInfo(3, 3, 8, "a", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    assert engine.assign_device(rank_info).local_rank == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert engine.assign_device(rank_info).local_rank == 3


@pytest.mark.parametrize("local_rank", [0, 7])
def test_more_ranks_than_gpus_are_refused_on_each(monkeypatch: pytest.MonkeyPatch, local_rank: int) -> None:
    """Also on local rank 0."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(
        UserError, match=f"LOCAL_RANK={local_rank}: ranks on this host: 8, visible GPUs: 4. Start no more ranks"
    ):
        engine.assign_device(RankInfo(local_rank, local_rank, 8, "a", 1))


def test_a_start_compiles_no_probe_of_deepspeeds_operators() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        free_port = server.getsockname()[1]
    script = f"""
import deepspeed.ops
def probe():
    raise AssertionError("probed")
deepspeed.ops._probe_compatible_ops = probe
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.zero.engine import init_distributed
init_distributed(RankInfo(0, 0, 1, "127.0.0.1", {free_port}), 1)
import torch.distributed as dist
print(dist.get_backend())
"""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "DS_ACCELERATOR": "cpu"}
    ended = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=120)
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert ended.stdout.split()[-1] == "gloo"


def test_measured_peaks_begin_behind_the_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty_cache"))
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: calls.append("reset"))
    monkeypatch.setattr("deepspeed.initialize", lambda **options: (calls.append("initialize") or options["model"],))
    monkeypatch.setattr(engine.dist, "get_world_size", lambda: 1)
    model = torch.nn.Linear(2, 2)
    monkeypatch.setattr(engine, "parameter_groups", lambda model, config: [])
    monkeypatch.setattr(engine, "build_optimizer", lambda groups, config: torch.optim.SGD(model.parameters(), 1.0))
    engine.build_engine(model, _config("zero=2"), Precision.fp32, 1)
    assert calls == ["initialize", "empty_cache", "reset"]
