"""Every way to lay a training run over given GPUs: what each needs, what fits, how long a step takes, which is fastest."""

from dataclasses import dataclass, replace
from typing import Any

from fireflyds.config import ClusterConfig, Offload, PlanConfig, Precision
from fireflyds.errors import UserError
from fireflyds.metrics.flops import StepFlops, visible_pairs
from fireflyds.optim.compatibility import check_compatibility
from fireflyds.planner import memory
from fireflyds.planner.memory import GIB, MemoryEstimate, Placement
from fireflyds.planner.model_shape import ModelShape

# Beside what torch counts: the driver's context, NCCL's buffers, and memory lost between blocks.
CONTEXT_GIB, NCCL_GIB, FRAGMENTED = 0.75, 0.75, 0.04
# Libraries of one rank on its host, GiB: with CUDA's, and without them (torch, transformers, DeepSpeed and PEFT after two
# steps of a tiny model: 0.52 measured, torch 2.13).
LIBRARIES_GIB, CPU_LIBRARIES_GIB = 3.0, 0.6
# Estimates: launching the kernels of a block and micro-batch forward and backward, and what DeepSpeed's CPU Adam updates
# in a second on one machine.
LAUNCH_SECONDS, CPU_ADAM_PER_SECOND = 5e-4, 1e9


@dataclass(frozen=True, slots=True)
class StepCost:
    """What one step of the whole cluster computes."""

    flops: float
    recomputed: float
    """On top, with gradient checkpointing: the forward pass of the blocks that have a backward pass."""
    repeated: float
    """On top: products that PEFT's DoRA computes a second time (`Linear.twice`), forward and back to their input."""
    tokens: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One way; `why_not` is empty where it fits."""

    where: Placement
    memory: MemoryEstimate
    host_per_node: float
    """Bytes."""
    why_not: str
    compute_seconds: float
    communication_seconds: float
    offload_seconds: float

    @property
    def fits(self) -> bool:
        return not self.why_not

    @property
    def seconds(self) -> float:
        """Of a step. Nothing is taken to overlap."""
        return self.compute_seconds + self.communication_seconds + self.offload_seconds

    @property
    def rank(self) -> tuple[Any, ...]:
        """Faster first; of equals what recomputes less, shards less, offloads less and takes larger micro-batches."""
        where = self.where
        away = where.offload_optimizer + where.offload_param
        return (round(self.seconds, 6), where.checkpointing, where.stage, away, -where.micro_batch_size)

    @property
    def offload(self) -> str:
        names = ["optimizer"] * self.where.offload_optimizer + ["param"] * self.where.offload_param
        return "+".join(names) or "none"


def step_cost(flops: StepFlops, shape: ModelShape, rows: float, lengths: list[int], labelled: int) -> StepCost:
    """Of documents of these lengths with `labelled` labels, `rows` times."""
    tokens = float(sum(lengths))
    recomputed = repeated = 0.0
    for block in shape.blocks:
        second = sum(2 * each.inputs * each.outputs for each in block.linears if each.twice) * tokens
        repeated += second * (1 + block.needs_gradient)
        if block.needs_gradient:
            base = sum(2 * each.inputs * each.outputs for each in block.linears)
            adapters = sum(2 * each.r * (each.inputs + each.outputs) for each in block.linears)
            # Scores and weighted sum.
            attention = 4 * shape.num_heads * shape.head_dim * visible_pairs(lengths, block.window)
            recomputed += (base + adapters) * tokens + second + attention
    return StepCost(rows * flops.count(lengths, labelled), rows * recomputed, rows * repeated, rows * tokens)


def all_candidates(
    shape: ModelShape, config: PlanConfig, precision: Precision, work: StepCost, peak: float, labelled_share: float
) -> list[Candidate]:
    """Stages, offloading, micro-batches that divide the global batch, with and without checkpointing; best first, those
    that do not fit behind.

    Raises:
        UserError: the GPUs do not divide the global batch.
    """
    world_size = config.cluster.world_size
    rows, rest = divmod(config.global_batch_size, world_size)
    if rest:
        raise UserError(
            f"global_batch_size={config.global_batch_size}: must be a multiple of {world_size} {units(config.cluster)} "
            f"(cluster.nodes x cluster.gpus_per_node). Nearest: {max(1, rows) * world_size}"
        )
    found = []
    for stage, optimizer, parameters in _layouts():
        if not _allowed(config, precision, stage, optimizer):
            continue
        for micro in (each for each in range(1, rows + 1) if rows % each == 0):
            for checkpointing in (False, True):
                where = Placement(stage, optimizer, parameters, micro, checkpointing, world_size, rows // micro)
                found.append(evaluate_candidate(shape, config, precision, work, peak, labelled_share, where))
    return sorted(found, key=lambda choice: (not choice.fits, choice.rank))


def _layouts() -> list[tuple[int, bool, bool]]:
    """Stage, whether the optimizer is offloaded, whether the parameters are."""
    return [
        (stage, optimizer, parameters)
        for stage in range(4)
        for optimizer, parameters in ((False, False), (True, False), (True, True))
        if not (optimizer and stage == 0) and not (parameters and stage != 3)
    ]


def _allowed(config: PlanConfig, precision: Precision, stage: int, offload: bool) -> bool:
    """Whether training would take it. What `zero.json` and `zero.extra` say of the layout is checked against the
    configuration's own alone: here it varies."""
    zero = replace(
        config.zero,
        json="",
        extra={},
        stage=stage,
        offload_optimizer=Offload.cpu if offload else Offload.none,
        offload_param=Offload.none,
    )
    try:
        check_compatibility(replace(config, zero=zero), precision)
    except UserError:
        return False
    return True


def evaluate_candidate(
    shape: ModelShape,
    config: PlanConfig,
    precision: Precision,
    work: StepCost,
    peak: float,
    share: float,
    where: Placement,
) -> Candidate:
    """What a placement needs, and how long its step takes."""
    cluster = config.cluster
    device = "cpu" if cluster.on_cpu else "cuda"
    needs = memory.estimate(shape, config, precision, where, device, share)
    host = cluster.gpus_per_node * _host_of_rank(needs, config)
    flops = work.flops + work.repeated + work.recomputed * where.checkpointing
    compute = flops / (where.world_size * peak * cluster.mfu)
    launches = LAUNCH_SECONDS * len(shape.blocks) * where.accumulation * (1 + where.checkpointing / 3)
    moved = communication_bytes(shape, precision, where)
    return Candidate(
        where,
        needs,
        host,
        _why_not(needs, host, cluster, device),
        compute + launches,
        moved / (cluster.link_gb_per_s * 1e9),
        _offload_seconds(shape, precision, where, cluster),
    )


def _host_of_rank(needs: MemoryEstimate, config: PlanConfig) -> float:
    """Bytes at the worst of training, saving and loading. On the CPU the rank itself is on the host; training goes on
    beside a checkpoint that is written in the background."""
    if not config.cluster.on_cpu:
        return max(needs.host + needs.host_saving, needs.host_loading) + LIBRARIES_GIB * GIB
    beside = needs.total if config.checkpoint.background else needs.resting
    return max(needs.total, beside + needs.host_saving, needs.host_loading) + CPU_LIBRARIES_GIB * GIB


def units(cluster: ClusterConfig) -> str:
    """What ranks are told as."""
    return "ranks" if cluster.on_cpu else "GPUs"


def _why_not(needs: MemoryEstimate, host: float, cluster: ClusterConfig, device: str) -> str:
    room = cluster.gpu_memory_gib
    if device == "cuda":
        room = room * (1 - FRAGMENTED) - CONTEXT_GIB - NCCL_GIB * (cluster.world_size > 1)
    if needs.total > room * GIB:
        return f"{needs.total / GIB:.1f} GiB of {room:.1f} GiB that a {units(cluster)[:-1]} has for it"
    if host > cluster.host_memory_gib * GIB:
        return f"{host / GIB:.0f} GiB of {cluster.host_memory_gib:g} GiB of the host"
    return ""


def communication_bytes(shape: ModelShape, precision: Precision, where: Placement) -> float:
    """What one GPU sends in a step (ring algorithms move (N - 1) / N of a tensor; an all-reduce does so twice).

    Stages 0 and 1 reduce gradients once a step, 2 and 3 after every micro-batch; 1 and 2 gather the updated weights once, 3
    gathers all weights twice a micro-batch.
    """
    wide = 4 if precision is Precision.fp32 else 2
    gradients = shape.trained * wide
    everything = (shape.trained + shape.frozen) * wide + shape.quantised_bytes
    passes = {
        0: 2 * gradients,
        1: 2 * gradients,
        2: (where.accumulation + 1) * gradients,
        3: where.accumulation * (gradients + 2 * everything),
    }[where.stage]
    return passes * (where.world_size - 1) / where.world_size


def _offload_seconds(shape: ModelShape, precision: Precision, where: Placement, cluster: ClusterConfig) -> float:
    """By DeepSpeed's sources (0.19) float32 gradients go down once a step, and weights come up after the update. What adds
    up over micro-batches does so on the GPU at stage 1; at stage 2 the sum goes down after each and comes up before the
    next, at stage 3 it comes up after the first too. Offloaded weights come up twice a micro-batch."""
    wide = 4 if precision is Precision.fp32 else 2
    mine = shape.trained / where.world_size
    moved, update = 0.0, 0.0
    if where.offload_optimizer:
        sums = {1: 0, 2: 2 * where.accumulation - 1 if where.accumulation > 1 else 0, 3: 2 * where.accumulation}
        moved += mine * (wide * sums[where.stage] + 4 + wide * (not where.offload_param))
        update = mine * cluster.gpus_per_node / CPU_ADAM_PER_SECOND
    if where.offload_param:
        everything = (shape.trained + shape.frozen) * wide + shape.quantised_bytes
        moved += 2 * where.accumulation * everything / where.world_size
    return moved / (cluster.host_link_gb_per_s * 1e9) + update
