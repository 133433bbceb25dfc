"""Starting DeepSpeed: the process group, and the engine around a model."""

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fireflyds.config import Precision, TrainConfig
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.errors import UserError
from fireflyds.optim.optimizers import build_optimizer, load_optimizer_spec, reset_step_counts
from fireflyds.optim.param_groups import parameter_groups
from fireflyds.zero.ds_config import build_ds_config


class Engine(Protocol):
    """What is used of `deepspeed.DeepSpeedEngine`. Everything beyond it is asked for through functions of this room."""

    module: Any
    optimizer: Any
    device: torch.device
    config: dict[str, Any]
    micro_steps: int
    global_steps: int
    skipped_steps: int

    def __call__(self, **inputs: Any) -> Any: ...

    def train(self) -> Any: ...

    def backward(self, loss: Tensor) -> Any: ...

    def step(self) -> Any: ...

    def zero_grad(self) -> Any: ...

    def get_global_grad_norm(self) -> Any: ...

    def zero_optimization_stage(self) -> int: ...

    def is_gradient_accumulation_boundary(self) -> bool: ...

    def fp16_enabled(self) -> bool: ...


class LossScaleError(Exception):
    """A gradient overflowed float16 at the least loss scale, at which DeepSpeed gives up."""


def init_distributed(ranks: RankInfo, timeout_minutes: float) -> None:
    """Join the other ranks. On a machine without a GPU the CPU accelerator is picked, with a line saying so."""
    ranks = _with_device(ranks)
    ranks.export()
    if not pick_accelerator() and ranks.rank == 0:
        print("no GPU here: training on the CPU (DeepSpeed's cpu accelerator, gloo)", flush=True)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # What it has not tested our tests have, at every stage.
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    # DeepSpeed calls collectives by names that newer torch announces to rename; nothing a user could do about.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed would compile a shared-memory all-reduce for a minute at the first start; gloo's is enough.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "gloo":
        torch.set_num_threads(_threads(ranks, os.environ))
    else:
        torch.cuda.set_device(ranks.local_rank)
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(minutes=timeout_minutes), verbose=False)


def _with_device(ranks: RankInfo) -> RankInfo:
    """Where Slurm or a wrapper of mpirun's shows each task but its own GPU, that is number 0 to it.

    Raises:
        UserError: there are more ranks than GPUs; on every rank of the host where its launcher says how many it has.
    """
    seen = torch.cuda.device_count()
    together = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "0")))
    if not seen or max(ranks.local_rank + 1, together) <= seen:
        return ranks
    if seen == 1 and not together:
        return replace(ranks, local_rank=0)
    raise UserError(
        f"local rank {ranks.local_rank} of {together or 'several'}: {seen} GPUs are visible on this host. Start no more ranks a host than it has GPUs, or look "
        "at CUDA_VISIBLE_DEVICES"
    )


def _threads(ranks: RankInfo, environment: Mapping[str, str]) -> int:
    """Ranks that each take all cores fight over them; launchers that know better say OMP_NUM_THREADS=1 to all."""
    if asked := environment.get("SLURM_CPUS_PER_TASK"):
        return int(asked)
    sizes = (environment.get(name) for name in ("LOCAL_SIZE", "LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE"))
    local_size = next((int(size) for size in sizes if size), ranks.world_size)
    # Slurm may give a job fewer cores than it is bound to.
    cores = min(len(os.sched_getaffinity(0)), int(environment.get("SLURM_CPUS_ON_NODE", 1 << 20)))
    return max(1, cores // local_size)


def pick_accelerator() -> bool:
    """Tell DeepSpeed what to run on, before its first import. False where that is the CPU."""
    if torch.cuda.is_available():
        return True
    os.environ["DS_ACCELERATOR"] = "cpu"
    return False


def build_engine(model: nn.Module, config: TrainConfig, precision: Precision, accumulation: int) -> Engine:
    """The DeepSpeed engine of a model whose trainable parameters are marked."""
    import deepspeed
    from deepspeed.runtime import compiler

    if not load_optimizer_spec(config.optim.name).compiles:
        # It marks its Muon for torch.compile wherever ZeRO is used, which loads a compiler at every start.
        compiler.compile = lambda *_, **__: lambda function: function
    optimizer = build_optimizer(parameter_groups(model, config), config)
    # At stage 0 DeepSpeed's 16-bit wrapper takes a real step with zero gradients when it is made: it must move nothing
    # and leave no trace in the states.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    engine: Engine
    with _fp16_allowed(precision):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=build_ds_config(config, precision, accumulation),
            dist_init_required=False,
        )
    if config.zero.stage == 0:
        reset_step_counts(optimizer)
    return engine


@contextlib.contextmanager
def _fp16_allowed(precision: Precision) -> Iterator[None]:
    """DeepSpeed refuses fp16 on a CPU without instructions for it; torch computes it all the same, slowly."""
    from deepspeed.accelerator import get_accelerator

    accelerator = get_accelerator()
    if precision is not Precision.fp16 or torch.cuda.is_available():
        yield
        return
    accelerator.is_fp16_supported = lambda: True
    try:
        yield
    finally:
        del accelerator.is_fp16_supported


def optimizer_step(engine: Engine) -> float:
    """Update the weights at the end of an accumulation, and return the gradient norm before clipping. At every ZeRO stage a
    step whose gradients are not finite changes nothing and is counted in `skipped_steps`.

    Raises:
        LossScaleError: a gradient overflowed float16 and the loss scale can fall no further.
    """
    norm = _replicated_grad_norm(engine)
    if norm is not None and not bool(norm.isfinite()):
        _skip_step(engine)
    else:
        try:
            engine.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise LossScaleError from error
    return float(norm if norm is not None else engine.get_global_grad_norm() or 0.0)


def _replicated_grad_norm(engine: Engine) -> Tensor | None:
    """The norm where gradients are whole on every rank; elsewhere DeepSpeed knows it after the step."""
    if engine.zero_optimization_stage() > 0:
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else None


def _skip_step(engine: Engine) -> None:
    """What DeepSpeed does by itself where it holds 32-bit masters: take no step with gradients that are not finite."""
    engine.zero_grad()
    engine.micro_steps += 1
    engine.global_steps += 1
    engine.skipped_steps += 1


def set_learning_rates(engine: Engine, factor: float) -> list[float]:
    """Every parameter group's rate becomes its peak times `factor`; they are returned in order."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return [group["lr"] for group in engine.optimizer.param_groups]


def loss_scale(engine: Engine) -> float | None:
    """The loss scale of fp16; None in other number formats."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def at_least_scale(engine: Engine) -> bool:
    """The loss scale can fall no further."""
    scale = loss_scale(engine)
    return scale is not None and scale <= engine.config["fp16"]["min_loss_scale"]
