"""The door to DeepSpeed: start the ranks, build the configuration, build the engine."""

import atexit
import contextlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
from torch import nn

from fireflyds.config import Offload, Optimizer, Precision, TrainConfig
from fireflyds.engine import deepspeed_json, optimizers
from fireflyds.engine.groups import parameter_groups
from fireflyds.engine.ranks import Ranks
from fireflyds.errors import UserError

T = TypeVar("T")


def start(ranks: Ranks, timeout_minutes: float) -> None:
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


def _with_device(ranks: Ranks) -> Ranks:
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


def _threads(ranks: Ranks, environment: Mapping[str, str]) -> int:
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


def leave() -> None:
    """Wait for the other ranks and part."""
    import deepspeed

    torch.distributed.barrier()
    deepspeed.comm.destroy_process_group()


def end(exit_code: int) -> NoReturn:
    """Leave the other ranks, and the process.

    Threads of gloo and NCCL outlive their groups. One that asks for the interpreter's lock while Python takes the
    interpreter down ends in C++ that may not throw: "terminate called without an active exception", SIGABRT after a run
    that was whole. So the interpreter is not taken down; what was registered for its end is done.
    """
    leave()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def on_rank_zero(work: Callable[[], T]) -> T | None:
    """Do something on rank 0 while the others wait; its `UserError` becomes everybody's, and so does trouble with the disk.
    Other ranks get None."""
    import torch.distributed as dist

    result, unexpected, failure = None, None, [None]
    if dist.get_rank() == 0:
        try:
            result = work()
        except Exception as error:
            unexpected = None if isinstance(error, UserError | OSError) else error
            remedy = ". Make room, or mend its rights, and give the same command again" * isinstance(error, OSError)
            failure = [f"{str(error) or repr(error)}{remedy}"]  # type: ignore[list-item]
    dist.broadcast_object_list(failure)
    if unexpected is not None:
        raise unexpected
    if failure[0] is not None:
        raise UserError(failure[0])
    return result


def deepspeed_config(config: TrainConfig, precision: Precision, accumulation: int) -> dict[str, Any]:
    """DeepSpeed's dict. Clipping is always said: from 0.19 on silence means 1.0."""
    zero: dict[str, Any] = {
        "stage": config.zero.stage,
        "reduce_bucket_size": config.zero.reduce_bucket_size,
        "overlap_comm": config.zero.overlap_comm,
    }
    if config.optim.name is Optimizer.muon:
        # Muon needs whole gradients of matrices.
        zero["reduce_scatter"] = False
    if config.zero.offload_optimizer is not Offload.none:
        zero["offload_optimizer"] = {"device": config.zero.offload_optimizer.name}
    if config.zero.offload_param is not Offload.none:
        zero["offload_param"] = {"device": config.zero.offload_param.name}
    extra, _ = deepspeed_json.extra(config)
    for key, value in extra.pop("zero_optimization", {}).items():
        # Of offloading the device is typed; how large its buffers are is not.
        zero[key] = zero[key] | value if isinstance(value, dict) and key in zero else value
    return {
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": optimizers.clipping(config.optim),
        "bf16": {"enabled": precision is Precision.bf16},
        "fp16": {
            "enabled": precision is Precision.fp16,
            "initial_scale_power": config.hardware.initial_scale_power,
            "loss_scale_window": config.hardware.loss_scale_window,
            "hysteresis": config.hardware.hysteresis,
            "min_loss_scale": config.hardware.min_loss_scale,
        },
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
        **extra,
    }


def build_engine(model: nn.Module, config: TrainConfig, precision: Precision, accumulation: int) -> Any:
    """The DeepSpeed engine of a model whose trainable parameters are marked."""
    import deepspeed
    from deepspeed.runtime import compiler

    if config.optim.name is not Optimizer.muon:
        # It marks its Muon for torch.compile wherever ZeRO is used, which loads a compiler at every start.
        compiler.compile = lambda *_, **__: lambda function: function
    optimizer = optimizers.build(parameter_groups(model, config), config)
    # At stage 0 DeepSpeed's 16-bit wrapper takes a real step with zero gradients when it is made: it must move nothing
    # and leave no trace in the states.
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    with _fp16_allowed(precision):
        engine, *_ = deepspeed.initialize(
            model=model,
            optimizer=optimizer,
            config=deepspeed_config(config, precision, accumulation),
            dist_init_required=False,
        )
    if config.zero.stage == 0:
        optimizers.forget_steps(optimizer)
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


def loss_scale(engine: Any) -> float | None:
    """The loss scale of fp16; None in other number formats."""
    return float(engine.optimizer.loss_scale) if engine.fp16_enabled() else None


def at_least_scale(engine: Any) -> bool:
    """The loss scale can fall no further."""
    scale = loss_scale(engine)
    return scale is not None and scale <= engine.config["fp16"]["min_loss_scale"]
