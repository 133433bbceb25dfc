"""Search over the layouts of a training run on given GPUs: memory, feasibility and time per step, fastest first."""

from dataclasses import dataclass, replace
from typing import Any

from fireflyds.config import ClusterConfig, Offload, PlanConfig, Precision
from fireflyds.errors import UserError
from fireflyds.metrics.flops import StepFlops, visible_pairs
from fireflyds.optim.compatibility import check_compatibility, refuse_large_tensors
from fireflyds.planner import memory
from fireflyds.planner.memory import GIB, MemoryEstimate, Placement
from fireflyds.planner.model_shape import ModelShape

# GPU memory that torch does not count: CUDA context and NCCL buffers in GiB, and the share lost to fragmentation.
CONTEXT_GIB, NCCL_GIB, FRAGMENTED = 0.75, 0.75, 0.04
# Host memory of the libraries of one rank, GiB: with CUDA, and without (measured 0.52 for torch 2.13, transformers,
# DeepSpeed and PEFT after two steps of a tiny model).
LIBRARIES_GIB, CPU_LIBRARIES_GIB = 3.0, 0.6
# Estimates: seconds to launch the kernels of one block for one micro-batch (forward and backward), and parameters that
# DeepSpeed's CPU Adam updates per second on one machine.
LAUNCH_SECONDS, CPU_ADAM_PER_SECOND = 5e-4, 1e9


@dataclass(frozen=True, slots=True)
class StepCost:
    """FLOPs and tokens of one optimizer step of the whole cluster."""

    flops: float
    recomputed: float
    """Additional FLOPs of gradient checkpointing: second forward pass of the blocks that have a backward pass."""
    repeated: float
    """Additional FLOPs of products that PEFT's DoRA computes twice (`LinearShape.twice`): forward, input gradients."""
    tokens: float


@dataclass(frozen=True, slots=True)
class Candidate:
    """One layout with its estimates; `why_not`: why it does not fit, empty where it fits."""

    placement: Placement
    memory: MemoryEstimate
    host_per_node: float
    """Bytes of host memory."""
    why_not: str
    compute_seconds: float
    communication_seconds: float
    offload_seconds: float

    @property
    def fits(self) -> bool:
        """True where nothing excludes the candidate."""
        return not self.why_not

    @property
    def seconds(self) -> float:
        """Seconds per step, assuming that computation, communication and offloading do not overlap."""
        return self.compute_seconds + self.communication_seconds + self.offload_seconds

    @property
    def rank(self) -> tuple[Any, ...]:
        """Sort key: faster first; ties by less recomputation, sharding and offloading, then larger micro-batches."""
        placement = self.placement
        num_offloaded = placement.offload_optimizer + placement.offload_param
        return (
            round(self.seconds, 6),
            placement.checkpointing,
            placement.stage,
            num_offloaded,
            -placement.micro_batch_size,
        )

    @property
    def offload(self) -> str:
        """Offloaded parts, joined by `+`: `optimizer`, `param`; `none` where there are none."""
        names = ["optimizer"] * self.placement.offload_optimizer + ["param"] * self.placement.offload_param
        return "+".join(names) or "none"


def step_cost(flops: StepFlops, shape: ModelShape, rows: float, lengths: list[int], labelled: int) -> StepCost:
    """`rows` times the cost of documents with these `lengths` (in tokens) and `labelled` labels in total."""
    tokens = float(sum(lengths))
    recomputed = repeated = 0.0
    for block in shape.blocks:
        repeated_product = sum(2 * linear.inputs * linear.outputs for linear in block.linears if linear.twice) * tokens
        repeated += repeated_product * (1 + block.needs_gradient)
        if block.needs_gradient:
            base = sum(2 * linear.inputs * linear.outputs for linear in block.linears)
            adapters = sum(2 * linear.r * (linear.inputs + linear.outputs) for linear in block.linears)
            # Attention scores, and weighted sum of the values.
            attention = 4 * shape.num_heads * shape.head_dim * visible_pairs(lengths, block.window)
            recomputed += (base + adapters) * tokens + repeated_product + attention
    return StepCost(rows * flops.count(lengths, labelled), rows * recomputed, rows * repeated, rows * tokens)


def all_candidates(
    shape: ModelShape, config: PlanConfig, precision: Precision, work: StepCost, peak: float, labelled_share: float
) -> list[Candidate]:
    """All combinations of ZeRO stage, offloading, micro-batch size (divisors of the rows per rank) and gradient
    checkpointing that training supports; best first, those that do not fit last.

    Raises:
        UserError: the global batch is not a multiple of the number of GPUs.
    """
    world_size = config.cluster.world_size
    rows, remainder = divmod(config.global_batch_size, world_size)
    if remainder:
        raise UserError(
            f"must be a multiple of {world_size} {units(config.cluster)} (cluster.nodes x cluster.gpus_per_node)",
            key="global_batch_size",
            value=config.global_batch_size,
            remedy=f"Nearest: {max(1, rows) * world_size}",
        )
    candidates = []
    for stage, optimizer, parameters in _layouts():
        if not _is_supported(config, precision, stage, optimizer):
            continue
        for micro in (size for size in range(1, rows + 1) if rows % size == 0):
            for checkpointing in (False, True):
                placement = Placement(stage, optimizer, parameters, micro, checkpointing, world_size, rows // micro)
                candidates.append(evaluate_candidate(shape, config, precision, work, peak, labelled_share, placement))
    return sorted(candidates, key=lambda choice: (not choice.fits, choice.rank))


def _layouts() -> list[tuple[int, bool, bool]]:
    """Valid combinations of (ZeRO stage, optimizer is offloaded, parameters are offloaded)."""
    return [
        (stage, optimizer, parameters)
        for stage in range(4)
        for optimizer, parameters in ((False, False), (True, False), (True, True))
        if not (optimizer and stage == 0) and not (parameters and stage != 3)
    ]


def _is_supported(config: PlanConfig, precision: Precision, stage: int, offload: bool) -> bool:
    """True where training supports the layout. `zero.json` and `zero.extra` are ignored: they are validated against the
    configured layout only, and the layout varies here."""
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
    placement: Placement,
) -> Candidate:
    """Memory and time per step of one placement; `peak`: FLOP/s of one GPU, `share`: share of tokens with a label."""
    cluster = config.cluster
    device = "cpu" if cluster.on_cpu else "cuda"
    estimate = memory.estimate(shape, config, precision, placement, device, share)
    host_bytes = cluster.gpus_per_node * _host_bytes_per_rank(estimate, config)
    flops = work.flops + work.repeated + work.recomputed * placement.checkpointing
    compute = flops / (placement.world_size * peak * cluster.mfu)
    launches = LAUNCH_SECONDS * len(shape.blocks) * placement.accumulation * (1 + placement.checkpointing / 3)
    sent_bytes = communication_bytes(shape, precision, placement)
    return Candidate(
        placement,
        estimate,
        host_bytes,
        _too_large(shape, config, placement) or _reason_not_to_fit(estimate, host_bytes, cluster, device),
        compute + launches,
        sent_bytes / (cluster.link_gb_per_s * 1e9),
        offload_seconds(shape, precision, placement, cluster),
    )


def _host_bytes_per_rank(estimate: MemoryEstimate, config: PlanConfig) -> float:
    """Peak host memory of one rank during training, saving and loading, in bytes. On the CPU it includes the training
    memory of the rank; training continues while a checkpoint is written in the background."""
    if not config.cluster.on_cpu:
        return max(estimate.host + estimate.host_saving, estimate.host_loading) + LIBRARIES_GIB * GIB
    during_save = estimate.total if config.checkpoint.background else estimate.resting
    return max(estimate.total, during_save + estimate.host_saving, estimate.host_loading) + CPU_LIBRARIES_GIB * GIB


def units(cluster: ClusterConfig) -> str:
    """Plural noun for ranks in messages: `ranks` on CPUs, else `GPUs`."""
    return "ranks" if cluster.on_cpu else "GPUs"


def _reason_not_to_fit(estimate: MemoryEstimate, host: float, cluster: ClusterConfig, device: str) -> str:
    available = cluster.gpu_memory_gib
    if device == "cuda":
        available = available * (1 - FRAGMENTED) - CONTEXT_GIB - NCCL_GIB * (cluster.world_size > 1)
    if estimate.total > available * GIB:
        return f"{estimate.total / GIB:.1f} GiB needed, {available:.1f} GiB available per {units(cluster)[:-1]}"
    if host > cluster.host_memory_gib * GIB:
        return f"{host / GIB:.0f} GiB needed, {cluster.host_memory_gib:g} GiB available per host"
    return ""


def _too_large(shape: ModelShape, config: PlanConfig, placement: Placement) -> str:
    sizes = [sizes for sizes, _ in shape.groups]
    try:
        refuse_large_tensors(config, sizes, placement.stage, placement.world_size)
    except UserError as error:
        return str(error)
    return ""


def communication_bytes(shape: ModelShape, precision: Precision, placement: Placement) -> float:
    """Bytes that one GPU sends per step (ring algorithms send (N - 1) / N of a tensor; an all-reduce does so twice).

    Stages 0 and 1 reduce gradients once per step, 2 and 3 after every micro-batch; 1 and 2 gather the updated weights
    once per step, 3 gathers all weights twice per micro-batch. Stages 1 and 2 all-reduce every bucket of gradients
    (`use_multi_rank_bucket_allreduce`, DeepSpeed's default), 3 scatters them.
    """
    itemsize = 4 if precision is Precision.fp32 else 2
    gradients = shape.trained * itemsize
    all_weights = (shape.trained + shape.frozen) * itemsize + shape.quantised_bytes
    traffic = {
        0: 2 * gradients,
        1: 3 * gradients,
        2: (2 * placement.accumulation + 1) * gradients,
        3: placement.accumulation * (gradients + 2 * all_weights),
    }[placement.stage]
    return traffic * (placement.world_size - 1) / placement.world_size


def offload_seconds(shape: ModelShape, precision: Precision, placement: Placement, cluster: ClusterConfig) -> float:
    """Seconds per step for copies to and from the host and the update on the CPU, following DeepSpeed's source (0.19).

    float32 gradients are copied to the host once per step, and weights are copied back after the update. Accumulated
    gradients stay on the GPU at stage 1; at stage 2 they are copied to the host after each micro-batch and back before
    the next one, at stage 3 back after the first one, too. Offloaded weights are copied to the GPU twice per
    micro-batch.
    """
    itemsize = 4 if precision is Precision.fp32 else 2
    partition_numel = shape.trained / placement.world_size
    copied_bytes, update = 0.0, 0.0
    if placement.offload_optimizer:
        accumulation_copies = {
            1: 0,
            2: 2 * placement.accumulation - 1 if placement.accumulation > 1 else 0,
            3: 2 * placement.accumulation,
        }
        copied_bytes += partition_numel * (
            itemsize * accumulation_copies[placement.stage] + 4 + itemsize * (not placement.offload_param)
        )
        update = partition_numel * cluster.gpus_per_node / CPU_ADAM_PER_SECOND
    if placement.offload_param:
        all_weights = (shape.trained + shape.frozen) * itemsize + shape.quantised_bytes
        copied_bytes += 2 * placement.accumulation * all_weights / placement.world_size
    return copied_bytes / (cluster.host_link_gb_per_s * 1e9) + update
