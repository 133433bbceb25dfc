"""Memory of a training step on one GPU (or one rank of the CPU), itemised, before anything is loaded; and as measured.

A step has moments at which memory is highest: the loss, the start of the backward pass, its end, the optimizer. Each
is the sum of its items, and the plan is the highest of them. What DeepSpeed holds follows its sources (0.19), its stages
after arXiv 1910.02054.
"""

import resource
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from fireflyds.config import Offload, Precision, TrainConfig, TuningMethod
from fireflyds.optim.optimizers import load_optimizer_spec
from fireflyds.planner import activations
from fireflyds.planner.activations import ForwardSpec
from fireflyds.planner.model_shape import ModelShape, model_shape

GIB = 2**30
# cuBLAS' workspace and batches; on the CPU heaps that stay larger than what is in them.
_FIXED = {"cuda": 64 * 2**20, "cpu": 32 * 2**20}
# DeepSpeed's own settings, which `zero.extra` alone changes: numbers gathered and kept at stage 3, ahead of need, in one
# go of the optimizer, and in one all-reduce of stage 0.
_LIVE, _SUB_GROUP, _ALL_REDUCE = 10**9, 10**9, 5 * 10**8

ITEMS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers", "fixed")


@dataclass(frozen=True, slots=True)
class Placement:
    """Where things live and how they are computed: what a plan varies."""

    stage: int
    offload_optimizer: bool
    offload_param: bool
    micro_batch_size: int
    checkpointing: bool
    world_size: int
    accumulation: int


@dataclass(frozen=True, slots=True)
class MemoryEstimate:
    """Bytes of one GPU at the moment when most is in use, by item, and of the host for one rank."""

    moment: str
    items: dict[str, float]
    highest: dict[str, float]
    """Each item at the moment when it is highest itself: they are not all so at once."""
    host: float
    """Offloaded states, in use all the time."""
    host_loading: float
    """While weights are read: before they are on the GPU."""
    host_saving: float
    """Beside what is in use: the copy of masters and states that a checkpoint is written from (`fragments.snapshot`)."""

    @property
    def total(self) -> float:
        return sum(self.items.values())

    @property
    def resting(self) -> float:
        """Between steps, when nothing is computed."""
        return self.items["weights"] + self.items["optimizer"] + self.items["fixed"]


def placement_of(config: TrainConfig, world_size: int, accumulation: int) -> Placement:
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
    where: Placement,
    device: str,
    labelled_share: float = 1.0,
) -> MemoryEstimate:
    """The itemised plan; `device` is `cuda` or `cpu`, whose kernels keep different things."""
    held = _MemoryModel(shape, config, precision, where, device)
    found = held.moments(labelled_share)
    name = max(found, key=lambda each: sum(found[each].values()))
    highest = {item: max(items[item] for items in found.values()) for item in ITEMS}
    saving = (4 * shape.trained + shape.state_bytes) / where.world_size
    return MemoryEstimate(name, found[name], highest, held.host(), held.loading(), saving)


def moments(
    shape: ModelShape, config: TrainConfig, precision: Precision, where: Placement, device: str
) -> dict[str, dict[str, float]]:
    """Bytes by item at every moment that may be the highest; `estimate` takes the one that is."""
    return _MemoryModel(shape, config, precision, where, device).moments(1.0)


class _MemoryModel:
    """What one rank holds under a placement, item by item."""

    def __init__(
        self, shape: ModelShape, config: TrainConfig, precision: Precision, where: Placement, device: str
    ) -> None:
        tuning = config.tuning
        self.shape, self.where, self.device, self.config = shape, where, device, config
        self.wide = 4 if precision is Precision.fp32 else 2
        plain = tuning.method is TuningMethod.qlora and tuning.bits == 4 and not tuning.use_dora
        self.how = ForwardSpec(
            device=device,
            wide=self.wide,
            half=precision is Precision.fp16,
            dropout=tuning.dropout if tuning.has_adapters else 0.0,
            fused_adapters=plain and where.stage != 3,
            dora=tuning.use_dora,
            checkpointing=where.checkpointing,
        )
        self.shards = where.world_size if where.stage else 1
        self.trained = shape.trained
        self.each = self.trained / self.shards
        # Fused AdamW of a GPU needs nothing; on the CPU it holds a root and a quotient of a tensor. bitsandbytes is fused.
        spec = load_optimizer_spec(config.optim.name)
        self.stepping = spec.cpu_step_copies if device == "cpu" else 0

    def weights(self) -> float:
        whole = self.trained * self.wide + self.shape.frozen * self.wide + self.shape.quantised_bytes
        return whole / self.shards if self.where.stage == 3 else whole

    def optimizer(self) -> float:
        """32-bit masters and states."""
        masters = 4 if self.wide == 2 or self.where.stage else 0
        return (self.trained * masters + self.shape.state_bytes) / self.shards

    def gradients(self, *, end: bool) -> float:
        """Between micro-batches, and at the end of the last backward pass."""
        w, stage, again = self.wide, self.where.stage, self.where.accumulation > 1
        if stage == 0:
            return self.trained * w * (again or end)
        if stage == 3:
            return self.each * w * (not self.where.offload_optimizer)
        mine = sum(kept_of(sizes, self.shards) for sizes, _ in self.shape.groups) * w
        if self.where.offload_optimizer:
            return self.trained * w * (again and stage == 1)
        if stage == 1:
            # Whole until the last micro-batch, then what belongs to this rank beside what is not yet reduced.
            return self.trained * w * (again or end)
        return mine * (again + end)

    def buffers(self, *, backward: bool) -> float:
        """Of communication: gradients on their way, and gathered weights of stage 3."""
        stage, w, zero = self.where.stage, self.wide, self.config.zero
        bucket = min(zero.reduce_bucket_size, max(self.trained, 1)) * w
        live = 0.0
        if stage == 3:
            bucket = zero.reduce_bucket_size * w
            body = self.shape.frozen * w + self.trained * w + self.shape.quantised_bytes
            live = min(body, _LIVE * w) if self.shards > 1 or self.where.offload_param else 0.0
        held = bucket if stage == 3 or (stage and backward) else 0.0
        if stage == 0 and backward and self.where.world_size > 1:
            held = min(self.trained, _ALL_REDUCE) * w
        if zero.overlap_comm and stage:
            held *= 2
        # Offloaded gradients pass through a buffer of the largest, on either side.
        sides = 2 if self.device == "cpu" else 1
        passing = sides * self.shape.largest * w * (self.where.offload_optimizer and stage < 3)
        return held + live + passing

    def moments(self, labelled_share: float) -> dict[str, dict[str, float]]:
        shape, how, where = self.shape, self.how, self.where
        tokens = where.micro_batch_size * self.config.seq_len
        blocks = [
            activations.block_bytes(block, shape, how) * tokens + activations.weight_bytes(block, how)
            for block in shape.blocks
        ]
        kept = [activations.boundary_bytes(block, shape, how) * tokens for block in shape.blocks]
        loss = activations.loss_bytes(shape, how, tokens, round(tokens * labelled_share))
        passing = activations.passing_bytes(shape, how) * tokens + activations.unpacked_bytes(shape, how)
        across = sum(kept) + max(blocks) if where.checkpointing else sum(blocks)
        still = {"weights": self.weights(), "optimizer": self.optimizer(), "fixed": float(_FIXED[self.device])}
        if where.offload_param and self.device == "cuda":
            still["weights"] = 0.0
        if where.offload_optimizer:
            # On the CPU the host is the device.
            still["optimizer"] = self.offloaded() if self.device == "cpu" else 0.0
        before, during = self.gradients(end=False), self.buffers(backward=False)
        found = {
            "loss": {
                "gradients": before,
                "activations": sum(kept if where.checkpointing else blocks),
                "logits": loss.forming,
                "buffers": during,
            },
            "backward": {
                "gradients": before,
                "activations": across + passing,
                "logits": loss.returning,
                "buffers": self.buffers(backward=self.device == "cuda"),
            },
            "end of backward": {
                "gradients": self.gradients(end=True) + self.orthogonalising(),
                "activations": max(blocks) + passing,
                "buffers": self.buffers(backward=True),
            },
            "optimizer": {"gradients": self.update() + self.orthogonalising(), "buffers": during},
        }
        return {
            name: {item: float(round((still | items).get(item, 0.0))) for item in ITEMS}
            for name, items in found.items()
        }

    def orthogonalising(self) -> float:
        """Muon's momentum and update beside the old ones, until it is known that no gradient overflows."""
        if not load_optimizer_spec(self.config.optim.name).treats_matrices_apart or self.where.stage == 0:
            return 0.0
        matrices = max(sum(sizes) for sizes, _ in self.shape.groups) / self.shards
        return matrices * (4 + self.wide)

    def update(self) -> float:
        """Gradients while the optimizer works: as they came, flat or in float32, and its own room."""
        w, stage = self.wide, self.where.stage
        if self.where.offload_optimizer:
            return 0.0
        if stage == 0:
            return self.trained * (w + (4 if w == 2 else 0)) + self.stepping * 4 * self.shape.largest
        group = max(sum(sizes) for sizes, _ in self.shape.groups) / self.shards
        if stage == 3:
            group = min(group, _SUB_GROUP)
        mine = self.each if stage == 3 else sum(kept_of(sizes, self.shards) for sizes, _ in self.shape.groups)
        return mine * w + max(group * (4 + w if w == 2 else 4), group * 4 * (1 + self.stepping))

    def offloaded(self) -> float:
        """Masters, states and float32 gradients, a copy of the shard in the model's format, and gradients that add up:
        at stage 1 they do so on the GPU, at stage 3 their place is there always."""
        again = self.where.stage == 3 or (self.where.stage == 2 and self.where.accumulation > 1)
        return self.optimizer() + self.each * (4 + self.wide + self.wide * again)

    def host(self) -> float:
        return self.offloaded() * self.where.offload_optimizer + self.weights() * self.where.offload_param

    def loading(self) -> float:
        """Every rank reads the whole model on its host, except where it is quantised on the way."""
        quantised = self.config.tuning.method is TuningMethod.qlora
        return 0.0 if quantised else (self.trained + self.shape.frozen) * self.wide


def kept_of(sizes: tuple[int, ...], shards: int) -> int:
    """Of gradients laid end to end and cut in equal parts, those that touch the part of the rank with most: whole ones."""
    ends = list(accumulate(sizes))
    part = -(-ends[-1] // shards)
    touched = (
        sum(size for size, end in zip(sizes, ends, strict=True) if end > at * part and end - size < (at + 1) * part)
        for at in range(min(shards, ends[-1]))
    )
    return max(touched)


def format_memory(model: Any, config: TrainConfig, precision: Precision, world_size: int, accumulation: int) -> str:
    """What a run is planned to need. To be asked before the engine is built."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    found = estimate(
        model_shape(model, config), config, precision, placement_of(config, world_size, accumulation), device
    )
    parts = ", ".join(f"{name} {size / GIB:.2f}" for name, size in found.items.items() if size >= GIB / 200)
    host = f"; host {found.host / GIB:.1f} GiB a rank" if found.host and device == "cuda" else ""
    where = "a GPU" if device == "cuda" else "a rank, libraries aside"
    return f"planned peak {found.total / GIB:.2f} GiB {where}, at its {found.moment} ({parts}){host}"


def resident_bytes() -> int:
    """The most memory of this process so far: taken before a model is loaded, it is what the libraries need."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def format_peak(before: int = 0) -> str:
    """The peak of this rank so far; on the CPU over `before` (see `resident`)."""
    if torch.cuda.is_available():
        peak, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        return f"measured peak {peak / GIB:.2f} GiB a GPU ({reserved / GIB:.2f} GiB reserved)"
    return f"measured peak {(resident_bytes() - before) / GIB:.2f} GiB a rank, libraries aside"
