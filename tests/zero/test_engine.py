import pytest
import torch

from fireflyds import app
from fireflyds.config import Precision
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.errors import UserError
from fireflyds.zero import ds_config, engine


def _config(*overrides: str):
    return app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=3", *overrides])


def test_clipping_is_always_said() -> None:
    for norm in ("0", "0.3"):
        assert ds_config.build_ds_config(_config(f"optim.max_grad_norm={norm}"), Precision.fp32, 1)[
            "gradient_clipping"
        ] == float(norm)


def test_what_is_typed_and_what_is_passed_through_reach_deepspeed() -> None:
    made = ds_config.build_ds_config(
        _config("zero=stage3", "zero.offload_param=cpu", "zero.extra.wall_clock_breakdown=true", "micro_batch_size=3"),
        Precision.bf16,
        4,
    )
    assert made["zero_optimization"]["stage"] == 3
    assert made["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert made["wall_clock_breakdown"] is True
    assert (made["train_micro_batch_size_per_gpu"], made["gradient_accumulation_steps"]) == (3, 4)
    assert made["bf16"]["enabled"]
    assert not made["fp16"]["enabled"]
    assert "scheduler" not in made
    assert "optimizer" not in made


def test_a_global_batch_that_does_not_divide_names_the_nearest() -> None:
    assert _config("global_batch_size=8", "micro_batch_size=2").accumulation_steps(2) == 2
    with pytest.raises(UserError, match=r"global_batch_size=7: .*micro_batch_size=2 x 2 ranks = 4\. Nearest: 4"):
        _config("global_batch_size=7", "micro_batch_size=2").accumulation_steps(2)


def test_cores_are_shared_by_the_ranks_of_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine.os, "sched_getaffinity", lambda process: set(range(16)))
    me = RankInfo(0, 0, 64, "a", 1)
    assert engine.cpu_threads(me, {}) == 1
    assert engine.cpu_threads(me, {"LOCAL_WORLD_SIZE": "4"}) == 4
    assert engine.cpu_threads(me, {"SLURM_NTASKS_PER_NODE": "2"}) == 8
    assert engine.cpu_threads(me, {"SLURM_NTASKS_PER_NODE": "2", "SLURM_CPUS_ON_NODE": "6"}) == 3
    assert engine.cpu_threads(me, {"SLURM_CPUS_PER_TASK": "12", "SLURM_NTASKS_PER_NODE": "2"}) == 12


def test_a_task_that_sees_its_own_gpu_alone_takes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    me = RankInfo(3, 3, 8, "a", 1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.delenv("LOCAL_SIZE", raising=False)
    assert engine.assign_device(me).local_rank == 0
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    assert engine.assign_device(me).local_rank == 3


@pytest.mark.parametrize("local_rank", [0, 7])
def test_more_ranks_than_gpus_are_refused_on_each(monkeypatch: pytest.MonkeyPatch, local_rank: int) -> None:
    """Also on the one that speaks for its host."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(
        UserError, match=f"LOCAL_RANK={local_rank}: ranks on this host: 8, visible GPUs: 4. Start no more ranks"
    ):
        engine.assign_device(RankInfo(local_rank, local_rank, 8, "a", 1))
