"""Initialisation of DeepSpeed (process group, engine), and the optimizer step."""

import contextlib
import math
import os
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fireflyds.config import Precision, TrainConfig
from fireflyds.distributed.host_identity import local_world_size
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.errors import UserError
from fireflyds.optim.compatibility import refuse_large_tensors
from fireflyds.optim.optimizers import build_optimizer, load_optimizer_spec, reset_step_counts
from fireflyds.optim.param_groups import logical_numel, parameter_groups
from fireflyds.zero.ds_config import build_ds_config
from fireflyds.zero.sharding import shard_parameters


class Engine(Protocol):
    """The used members of `deepspeed.DeepSpeedEngine`. Anything else is accessed through functions of this package."""

    module: Any
    optimizer: Any
    device: torch.device
    config: dict[str, Any]
    micro_steps: int
    global_steps: int
    skipped_steps: int

    def __call__(self, **inputs: Any) -> Any:
        """Runs the forward pass of the module."""

    def train(self) -> Any:
        """Switches the module to training mode."""

    def backward(self, loss: Tensor) -> Any:
        """Accumulates the gradients of a micro-batch's loss."""

    def step(self) -> Any:
        """Ends a micro-batch; the last one of a step updates the weights."""

    def zero_grad(self) -> Any:
        """Clears the gradients."""

    def get_global_grad_norm(self) -> Any:
        """L2 norm of the last step's gradients over all ranks, before clipping."""

    def zero_optimization_stage(self) -> int:
        """ZeRO stage, 0 to 3."""

    def is_gradient_accumulation_boundary(self) -> bool:
        """True for the last micro-batch of a step."""

    def fp16_enabled(self) -> bool:
        """True where the model computes in float16, with a loss scale."""


class LossScaleError(Exception):
    """A gradient overflowed float16 at the minimum loss scale, where DeepSpeed raises an exception."""


def init_distributed(ranks: RankInfo, timeout_minutes: float) -> None:
    """Initialises the process group (NCCL, or gloo on the CPU) and DeepSpeed. Without a GPU rank 0 prints a notice."""
    ranks = assign_device(ranks)
    ranks.export()
    if not pick_accelerator() and ranks.rank == 0:
        print("no GPU here: training on the CPU (DeepSpeed's cpu accelerator, gloo)", flush=True)
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # DeepSpeed warns about optimizers that it has not tested; ours are tested at every ZeRO stage.
    logger.addFilter(lambda record: "untested optimizer" not in record.getMessage())
    # DeepSpeed uses collectives whose names newer versions of torch deprecate; users cannot change that.
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    # DeepSpeed would compile a shared-memory all-reduce at the first start, for a minute; gloo's is sufficient. The
    # table is set as a whole: reading it makes DeepSpeed compile a probe of every operator it has.
    deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    # Also beside a GPU: DeepSpeed's Adam of an offloaded optimizer runs on these threads.
    torch.set_num_threads(cpu_threads(ranks, os.environ))
    if backend == "nccl":
        torch.cuda.set_device(ranks.local_rank)
    deepspeed.init_distributed(dist_backend=backend, timeout=timedelta(minutes=timeout_minutes), verbose=False)


def assign_device(ranks: RankInfo) -> RankInfo:
    """Returns `ranks` with local rank 0 where Slurm or an mpirun wrapper makes only its own GPU visible to each task.

    Raises:
        UserError: more ranks than GPUs on a host; on all its ranks where the launcher sets the local world size.
    """
    num_gpus = torch.cuda.device_count()
    local_size = local_world_size()
    if not num_gpus or max(ranks.local_rank + 1, local_size) <= num_gpus:
        return ranks
    if num_gpus == 1 and not local_size:
        return replace(ranks, local_rank=0)
    raise UserError(
        f"ranks on this host: {local_size or 'several'}, visible GPUs: {num_gpus}",
        key="LOCAL_RANK",
        value=ranks.local_rank,
        remedy="Start no more ranks per host than it has GPUs, or check CUDA_VISIBLE_DEVICES",
    )


def cpu_threads(ranks: RankInfo, environment: Mapping[str, str]) -> int:
    """Returns the CPU threads of this rank: its Slurm allocation, or the cores of the host divided by its ranks.

    By default each rank would use all cores, or with launchers that set OMP_NUM_THREADS=1 only one.
    """
    if cpus := environment.get("SLURM_CPUS_PER_TASK"):
        return int(cpus)
    local_size = local_world_size(environment) or int(environment.get("SLURM_NTASKS_PER_NODE") or ranks.world_size)
    # A job may have a larger CPU affinity than Slurm allocated to it.
    cores = min(len(os.sched_getaffinity(0)), int(environment.get("SLURM_CPUS_ON_NODE", 1 << 20)))
    return max(1, cores // local_size)


def pick_accelerator() -> bool:
    """Sets DeepSpeed's accelerator (`DS_ACCELERATOR`), before its first import. Returns False for the CPU."""
    if torch.cuda.is_available():
        return True
    os.environ["DS_ACCELERATOR"] = "cpu"
    return False


def build_engine(model: nn.Module, config: TrainConfig, precision: Precision, accumulation: int) -> Engine:
    """Builds the DeepSpeed engine of a model with `requires_grad` set. `accumulation`: micro-batches per step."""
    import deepspeed
    from deepspeed.runtime import compiler

    if not load_optimizer_spec(config.optim.name).compiles:
        # DeepSpeed decorates its Muon with torch.compile wherever ZeRO is used, which loads a compiler at every start.
        compiler.compile = lambda *_, **__: lambda function: function
    groups = parameter_groups(model, config)
    sizes = [[logical_numel(parameter) for parameter in group.parameters] for group in groups]
    ds_config = build_ds_config(config, precision, accumulation)
    sub_group_size = int(ds_config["zero_optimization"].get("sub_group_size", 10**9))
    refuse_large_tensors(config, sizes, config.zero.stage, dist.get_world_size(), sub_group_size)
    if config.zero.stage == 3:
        # Behind the groups, which are made by shapes that sharded parameters no longer have.
        shard_parameters(model, ds_config, config, precision)
    optimizer = build_optimizer(groups, config)
    # At stage 0 the constructor of DeepSpeed's 16-bit wrapper takes an optimizer step with zero gradients: a rate of 0
    # keeps the weights unchanged, and the step counts are reset below.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    engine: Engine
    with _allow_fp16(precision):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=ds_config,
            dist_init_required=False,
        )
    if config.zero.stage == 0:
        reset_step_counts(optimizer)
        if hasattr(engine.optimizer, "overflow_checker"):
            # It waits for the device once per parameter; `optimizer_step` has found the norm finite before.
            engine.optimizer.overflow_checker.has_overflow_serial = lambda params: False
    if torch.cuda.is_available():
        # The measured peak is that of the training: loading and flattening take more, once.
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    return engine


@contextlib.contextmanager
def _allow_fp16(precision: Precision) -> Iterator[None]:
    """Context in which DeepSpeed accepts fp16 on a CPU without fp16 instructions, where torch emulates it, slowly."""
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
    """Updates the weights after the last micro-batch of a step, and returns the gradient norm before clipping.

    At every ZeRO stage a step with non-finite gradients leaves the weights unchanged and increments `skipped_steps`.

    Raises:
        LossScaleError: a gradient overflowed float16 at the minimum loss scale.
    """
    replicated = _replicated_grad_norm(engine)
    # One wait for the device: a tensor's truth and its value are two.
    norm = None if replicated is None else float(replicated)
    if norm is not None and not math.isfinite(norm):
        _skip_step(engine)
    else:
        try:
            engine.step()
        except Exception as error:
            if "loss scale already at minimum" not in str(error):
                raise
            raise LossScaleError(str(error)) from error
    if norm is None:
        partitioned = engine.get_global_grad_norm()
        norm = 0.0 if partitioned is None else float(partitioned)
    return norm


def _replicated_grad_norm(engine: Engine) -> Tensor | None:
    """Returns the gradient norm at stage 0; None at other stages, where DeepSpeed computes it during the step."""
    if engine.zero_optimization_stage() > 0:
        return None
    gradients = [parameter.grad for parameter in engine.module.parameters() if parameter.grad is not None]
    return torch.nn.utils.get_total_norm(gradients) if gradients else None


def _skip_step(engine: Engine) -> None:
    """Discards the gradients and counts the step as skipped, as DeepSpeed does itself with 32-bit master weights."""
    engine.zero_grad()
    engine.micro_steps += 1
    engine.global_steps += 1
    engine.skipped_steps += 1


def set_learning_rates(engine: Engine, factor: float) -> list[float]:
    """Sets the learning rate of every parameter group to its peak times `factor`; returns them in order."""
    for group in engine.optimizer.param_groups:
        group["lr"] = group["initial_lr"] * factor
    return [group["lr"] for group in engine.optimizer.param_groups]


def loss_scale(engine: Engine) -> float | None:
    """Returns the loss scale of fp16; None for other precisions."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def at_min_loss_scale(engine: Engine) -> bool:
    """True where the loss scale is at its minimum."""
    scale = loss_scale(engine)
    return scale is not None and scale <= engine.config["fp16"]["min_loss_scale"]
