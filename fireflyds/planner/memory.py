"""Estimated memory of a training step on one GPU (or one CPU rank), by item, and the measured peak.

Memory peaks in one of four phases of a step (loss, start and end of the backward pass, optimizer) or, on a GPU, while
the model is loaded; the phase with the highest sum counts. Allocations of DeepSpeed follow its source (0.19), ZeRO
stages arXiv 1910.02054.
"""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from fireflyds.config import ModelInit, Offload, Precision, TrainConfig, TuningMethod
from fireflyds.optim.optimizers import load_optimizer_spec
from fireflyds.planner import activations
from fireflyds.planner.activations import ForwardSpec
from fireflyds.planner.model_shape import ModelShape, model_shape

GIB = 2**30
# Bytes of the cuBLAS workspace and input batches; on the CPU, of heap memory that is not returned to the system.
_FIXED_BYTES = {"cuda": 64 * 2**20, "cpu": 32 * 2**20}
# DeepSpeed's defaults, which only `zero.extra` changes, in elements: gathered parameters at stage 3
# (`stage3_max_live_parameters`), sub-group of the optimizer (`sub_group_size`), all-reduce bucket of stage 0.
_MAX_LIVE_PARAMETERS, _SUB_GROUP_SIZE, _ALL_REDUCE_BUCKET_SIZE = 10**9, 10**9, 5 * 10**8

ITEMS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "fixed")


@dataclass(frozen=True, slots=True)
class Placement:
    """ZeRO stage, offloading, batch sizes and gradient checkpointing: the layout that a plan varies."""

    stage: int
    offload_optimizer: bool
    offload_param: bool
    micro_batch_size: int
    checkpointing: bool
    world_size: int
    accumulation: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one GPU by item in the phase with the highest total (`moment`), and host memory of one rank."""

    moment: str
    items: dict[str, float]
    highest: dict[str, float]
    """Peak of each item over all phases; items may peak in different phases."""
    host: float
    """Offloaded optimizer states and weights, allocated for the whole run."""
    host_loading: float
    """While weights are loaded, before they are moved to the GPU."""
    host_saving: float
    """In addition during a save: the copy of master weights and optimizer states that is written to the checkpoint."""

    @property
    def total(self) -> float:
        """Sum of the items, in bytes."""
        return sum(self.items.values())

    @property
    def resting(self) -> float:
        """Bytes allocated between steps, without gradients and activations."""
        return self.items["weights"] + self.items["optimizer"] + self.items["fixed"]


def placement_of(config: TrainConfig, world_size: int, accumulation: int) -> Placement:
    """The placement that a configuration asks for on `world_size` ranks; `accumulation`: micro-batches per step."""
    zero = config.zero
    return Placement(
        stage=zero.stage,
        offload_optimizer=zero.offload_optimizer is not Offload.none,
        offload_param=zero.offload_param is not Offload.none,
        micro_batch_size=config.micro_batch_size,
        checkpointing=config.hardware.gradient_checkpointing,
        world_size=world_size,
        accumulation=accumulation,
    )


def estimate(
    shape: ModelShape,
    config: TrainConfig,
    precision: Precision,
    placement: Placement,
    device: str,
    labelled_share: float = 1.0,
) -> MemoryEstimate:
    """Estimates memory by item; `device` is `cuda` or `cpu`, whose kernels save different tensors."""
    memory_model = _MemoryModel(shape, config, precision, placement, device)
    phases = memory_model.moments(labelled_share)
    peak_phase = max(phases, key=lambda phase: sum(phases[phase].values()))
    highest = {item: max(items[item] for items in phases.values()) for item in ITEMS}
    saving = (4 * shape.trained + shape.state_bytes) / placement.world_size
    return MemoryEstimate(peak_phase, phases[peak_phase], highest, memory_model.host(), memory_model.loading(), saving)


def moments(
    shape: ModelShape, config: TrainConfig, precision: Precision, placement: Placement, device: str
) -> dict[str, dict[str, float]]:
    """Bytes by item for every phase; `estimate` selects the highest."""
    return _MemoryModel(shape, config, precision, placement, device).moments(1.0)


class _MemoryModel:
    """Memory of one rank under a placement, by item, in bytes."""

    def __init__(
        self, shape: ModelShape, config: TrainConfig, precision: Precision, placement: Placement, device: str
    ) -> None:
        tuning = config.tuning
        self.shape, self.placement, self.device, self.config = shape, placement, device, config
        self.wide = 4 if precision is Precision.fp32 else 2
        is_fusable = tuning.method is TuningMethod.qlora and tuning.bits == 4 and not tuning.use_dora
        self.forward_spec = ForwardSpec(
            device=device,
            wide=self.wide,
            half=precision is Precision.fp16,
            dropout=tuning.dropout if tuning.has_adapters else 0.0,
            fused_adapters=is_fusable and placement.stage != 3,
            dora=tuning.use_dora,
            checkpointing=placement.checkpointing,
        )
        self.shards = placement.world_size if placement.stage else 1
        self.trained = shape.trained
        self.shard_numel = self.trained / self.shards
        # In copies of the largest tensor: none for fused AdamW; on the CPU square root and quotient.
        self.num_temporaries = load_optimizer_spec(config.optim.name).cpu_step_copies if device == "cpu" else 0

    def weights(self) -> float:
        total = self.trained * self.wide + self.shape.frozen * self.wide + self.shape.quantised_bytes
        return total / self.shards if self.placement.stage == 3 else total

    def optimizer(self) -> float:
        """float32 master weights and optimizer states."""
        masters = 4 if self.wide == 2 or self.placement.stage else 0
        return (self.trained * masters + self.shape.state_bytes) / self.shards

    def gradients(self, *, end: bool) -> float:
        """Gradients between micro-batches, or with `end` at the end of the last backward pass."""
        itemsize, stage, accumulates = self.wide, self.placement.stage, self.placement.accumulation > 1
        if stage == 0:
            return self.trained * itemsize * (accumulates or end)
        if stage == 3:
            return self.shard_numel * itemsize * (not self.placement.offload_optimizer)
        partitioned = sum(kept_of(sizes, self.shards) for sizes, _ in self.shape.groups) * itemsize
        if self.placement.offload_optimizer:
            return self.trained * itemsize * (accumulates and stage == 1)
        if stage == 1:
            # Not partitioned until the last micro-batch; then the partition of this rank and gradients not yet reduced.
            return self.trained * itemsize * (accumulates or end)
        return partitioned * (accumulates + end)

    def buffers(self, *, backward: bool) -> float:
        """Communication buffers: gradients in transfer, and gathered weights of stage 3."""
        stage, itemsize, zero = self.placement.stage, self.wide, self.config.zero
        bucket = min(zero.reduce_bucket_size, max(self.trained, 1)) * itemsize
        live = 0.0
        if stage == 3:
            bucket = zero.reduce_bucket_size * itemsize
            all_weights = self.shape.frozen * itemsize + self.trained * itemsize + self.shape.quantised_bytes
            live = (
                min(all_weights, _MAX_LIVE_PARAMETERS * itemsize)
                if self.shards > 1 or self.placement.offload_param
                else 0.0
            )
        gradient_buffers = bucket if stage == 3 or (stage and backward) else 0.0
        if stage == 0 and backward and self.placement.world_size > 1:
            gradient_buffers = min(self.trained, _ALL_REDUCE_BUCKET_SIZE) * itemsize
        if zero.overlap_comm and stage:
            gradient_buffers *= 2
        # Offloaded gradients are copied through a buffer of the size of the largest one, on host and device.
        num_copies = 2 if self.device == "cpu" else 1
        offload_buffers = num_copies * self.shape.largest * itemsize * (self.placement.offload_optimizer and stage < 3)
        return gradient_buffers + live + offload_buffers

    def moments(self, labelled_share: float) -> dict[str, dict[str, float]]:
        shape, spec, placement = self.shape, self.forward_spec, self.placement
        tokens = placement.micro_batch_size * self.config.seq_len
        blocks = [
            activations.block_bytes(block, shape, spec) * tokens + activations.weight_bytes(block, spec)
            for block in shape.blocks
        ]
        boundaries = [activations.boundary_bytes(block, shape, spec) * tokens for block in shape.blocks]
        loss = activations.loss_bytes(shape, spec, tokens, round(tokens * labelled_share))
        transient = activations.passing_bytes(shape, spec) * tokens + activations.unpacked_bytes(shape, spec)
        saved = sum(boundaries) + max(blocks) if placement.checkpointing else sum(blocks)
        persistent = {
            "weights": self.weights(),
            "optimizer": self.optimizer(),
            "fixed": float(_FIXED_BYTES[self.device]),
        }
        if placement.offload_param and self.device == "cuda":
            persistent["weights"] = 0.0
        if placement.offload_optimizer:  # on the CPU, host memory is device memory
            persistent["optimizer"] = self.offloaded() if self.device == "cpu" else 0.0
        gradients, buffers = self.gradients(end=False), self.buffers(backward=False)
        phases = {
            "loss": {
                "gradients": gradients,
                "activations": sum(boundaries if placement.checkpointing else blocks),
                "logits": loss.forming,
                "buffers": buffers,
            },
            "backward": {
                "gradients": gradients,
                "activations": saved + transient,
                "logits": loss.returning,
                "buffers": self.buffers(backward=self.device == "cuda"),
            },
            "end of backward": {
                "gradients": self.gradients(end=True) + self.orthogonalising(),
                "activations": max(blocks) + transient,
                "buffers": self.buffers(backward=True),
            },
            "optimizer": {"gradients": self.update() + self.orthogonalising(), "buffers": buffers},
        }
        if self.device == "cuda":
            phases["loading"] = {"optimizer": 0.0, "buffers": self.loading_copy()}
        return {
            name: {item: float(round((persistent | items).get(item, 0.0))) for item in ITEMS}
            for name, items in phases.items()
        }

    def loading_copy(self) -> float:
        """Weights held twice before the first step: at stage 3 one parameter (as read, and in the model's format), at 1
        and 2 those that DeepSpeed flattens."""
        stage = self.placement.stage
        return self.shape.largest * (4.0 + self.wide) if stage == 3 else self.trained * self.wide * (stage > 0)

    def orthogonalising(self) -> float:
        """New momentum and update of Muon, allocated in addition to the old ones until overflow is checked."""
        if not load_optimizer_spec(self.config.optim.name).treats_matrices_apart or self.placement.stage == 0:
            return 0.0
        matrices = max(sum(sizes) for sizes, _ in self.shape.groups) / self.shards
        return matrices * (4 + self.wide)

    def update(self) -> float:
        """Gradients in the optimizer step (as accumulated, flattened or in float32), and the step's temporaries."""
        itemsize, stage = self.wide, self.placement.stage
        if self.placement.offload_optimizer:
            return 0.0
        if stage == 0:
            return (
                self.trained * (itemsize + (4 if itemsize == 2 else 0)) + self.num_temporaries * 4 * self.shape.largest
            )
        group = max(sum(sizes) for sizes, _ in self.shape.groups) / self.shards
        if stage == 3:
            group = min(group, _SUB_GROUP_SIZE)
        numel = self.shard_numel if stage == 3 else sum(kept_of(sizes, self.shards) for sizes, _ in self.shape.groups)
        return numel * itemsize + max(
            group * (4 + itemsize if itemsize == 2 else 4), group * 4 * (1 + self.num_temporaries)
        )

    def offloaded(self) -> float:
        """Master weights, optimizer states and float32 gradients, a copy of the partition in the model's dtype, and
        accumulated gradients (on the GPU at stage 1; always allocated at stage 3)."""
        accumulates = self.placement.stage == 3 or (self.placement.stage == 2 and self.placement.accumulation > 1)
        return self.optimizer() + self.shard_numel * (4 + self.wide + self.wide * accumulates)

    def host(self) -> float:
        return self.offloaded() * self.placement.offload_optimizer + self.weights() * self.placement.offload_param

    def loading(self) -> float:
        """Host memory while loading: every rank reads the whole model, unless it is quantised or sharded meanwhile."""
        if self.placement.stage == 3 and self.config.model.init is not ModelInit.scratch:
            return self.loading_copy()
        return (
            0.0 if self.config.tuning.method is TuningMethod.qlora else (self.trained + self.shape.frozen) * self.wide
        )


def kept_of(sizes: tuple[int, ...], shards: int) -> int:
    """Maximum number of gradient elements that a rank keeps: gradients of these `sizes` are concatenated and cut into
    `shards` equal partitions, and every gradient that overlaps the partition of a rank is kept as a whole."""
    ends = list(accumulate(sizes))
    partition_size = -(-ends[-1] // shards)
    overlapping = (
        sum(
            size
            for size, end in zip(sizes, ends, strict=True)
            if end > index * partition_size and end - size < (index + 1) * partition_size
        )
        for index in range(min(shards, ends[-1]))
    )
    return max(overlapping)


def format_memory(model: Any, config: TrainConfig, precision: Precision, world_size: int, accumulation: int) -> str:
    """Describes the estimated peak memory of a run. Must be called before the engine is built (see `model_shape`)."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    estimated = estimate(
        model_shape(model, config), config, precision, placement_of(config, world_size, accumulation), device
    )
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in estimated.items.items() if size >= GIB / 200)
    host = f"; host {estimated.host / GIB:.1f} GiB per rank" if estimated.host and device == "cuda" else ""
    unit = "per GPU" if device == "cuda" else "per rank, without libraries"
    return f"planned peak {estimated.total / GIB:.2f} GiB {unit}, phase: {estimated.moment} ({parts}){host}"
