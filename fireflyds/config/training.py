"""A training run: its sections and the whole."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from fireflyds.config.data import DataConfig
from fireflyds.config.values import (
    ModelInit,
    Offload,
    Precision,
    Schedule,
    Tracker,
    TuningMethod,
    WandbMode,
    require_at_least,
)
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    init: ModelInit = MISSING
    """`pretrained` reads weights from `model.path`; `scratch` draws them at random for `model.architecture`."""
    path: str = ""
    """Hugging Face directory of the model (`init: pretrained`)."""
    tokenizer: str = ""
    """Tokenizer directory or `.model`; empty: `model.path`."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Hugging Face configuration values, `model_type` among them (`init: scratch`)."""

    def __post_init__(self) -> None:
        if self.init is ModelInit.pretrained and not self.path:
            raise UserError(
                "model.path is empty: a pretrained model needs its Hugging Face directory. Give model.path=<dir>"
            )
        if self.init is ModelInit.scratch and not (self.tokenizer and self.architecture.get("model_type")):
            raise UserError("model.init=scratch needs model.tokenizer and model.architecture.model_type; give both")

    @property
    def tokenizer_path(self) -> str:
        return self.tokenizer or self.path


@dataclass(kw_only=True, slots=True)
class TuningConfig:
    method: TuningMethod = MISSING
    """`full`, `lora` (adapters on a 16/32-bit base) or `qlora` (adapters on an NF4 base)."""
    r: int = 64
    """Rank of the adapters."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / r."""
    dropout: float = 0.05
    """Dropout in front of the adapters."""
    target_modules: list[str] = field(default_factory=list)
    """Linear layers that get adapters; empty: every linear layer of the family's blocks."""
    train_embeddings: bool = False
    """Train the input embeddings and the head too (needed when the vocabulary was expanded)."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"tuning.r={self.r}: the rank must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"tuning.dropout={self.dropout}: must be in [0, 1)")


@dataclass(kw_only=True, slots=True)
class ZeroConfig:
    stage: int = MISSING
    """ZeRO stage: 0 replicates, 1 shards optimizer states, 2 also gradients, 3 also parameters."""
    offload_optimizer: Offload = Offload.none
    """Where optimizer states live (stages 1-3)."""
    offload_param: Offload = Offload.none
    """Where parameters live (stage 3)."""
    reduce_bucket_size: int = 50_000_000
    """Elements reduced at once."""
    overlap_comm: bool = False
    """Overlap gradient reduction with the backward pass."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed configuration, passed through as it is (and printed)."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise UserError(f"zero.stage={self.stage}: must be 0, 1, 2 or 3")
        if self.offload_param is not Offload.none and self.stage != 3:
            raise UserError(f"zero.offload_param={self.offload_param.name} needs zero.stage=3, got {self.stage}")
        if self.offload_optimizer is not Offload.none and self.stage == 0:
            raise UserError("zero.offload_optimizer needs zero.stage of at least 1, got 0")
        ours = {
            "optimizer",
            "scheduler",
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
            "bf16",
            "fp16",
        } & self.extra.keys()
        if "stage" in self.extra.get("zero_optimization", {}):
            raise UserError("zero.extra.zero_optimization.stage: use zero.stage")
        if ours:
            raise UserError(
                f"zero.extra.{min(ours)}: fireflyds sets this itself; use optim.*, micro_batch_size, "
                "global_batch_size or hardware.precision"
            )


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    steps: int | None = None
    """Optimizer steps. Goes before `epochs`."""
    epochs: float | None = None
    """Passes over the data, used when `steps` is not given."""
    lr: float = MISSING
    """Peak learning rate."""
    schedule: Schedule = Schedule.cosine
    """`cosine` (to `min_lr_ratio`), `linear` (likewise), `constant`, `constant_with_warmup`."""
    warmup_steps: int | None = None
    """Steps of linear warm-up. Goes before `warmup_ratio`."""
    warmup_ratio: float = 0.0
    """Share of the steps that warm up."""
    min_lr_ratio: float = 0.1
    """Floor of cosine and linear decay, as a share of `lr`."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """AdamW's decay rates."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this global norm; 0 turns clipping off."""

    def __post_init__(self) -> None:
        if self.steps is None and self.epochs is None:
            raise UserError("optim.steps and optim.epochs are both unset: say how long to train, e.g. optim.steps=1000")
        for name in ("steps", "epochs", "lr"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"optim.{name}={value}: must be greater than 0")
        if not 0 <= self.warmup_ratio <= 1:
            raise UserError(f"optim.warmup_ratio={self.warmup_ratio}: must be in [0, 1]")


@dataclass(kw_only=True, slots=True)
class HardwareConfig:
    precision: Precision = MISSING
    """Number format; `auto`: bf16 on a GPU that has it, fp16 on an older GPU, fp32 on the CPU."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    timeout_minutes: float = 30.0
    """A collective that takes longer ends the run."""


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    kind: Tracker = MISSING
    """`none` (files only) or `wandb` (rank 0 only)."""
    project: str = "fireflyds"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""
    mode: WandbMode = WandbMode.online
    """W&B mode: `online`, `offline` or `disabled`."""


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every: int = 500
    """Save every so many steps; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept."""

    def __post_init__(self) -> None:
        if self.every < 1 or self.keep < 1:
            raise UserError(f"checkpoint.every={self.every}, checkpoint.keep={self.keep}: both must be at least 1")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    run: str = MISSING
    """Name of the run: its folder and its identity. The same name resumes."""
    runs: str = "runs"
    """Folder that holds the runs."""
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    tuning: TuningConfig = MISSING
    zero: ZeroConfig = MISSING
    optim: OptimConfig = MISSING
    hardware: HardwareConfig = MISSING
    tracking: TrackingConfig = MISSING
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    seq_len: int = 1024
    """Tokens in a packed row; longer documents are cut, dialogues end at the last whole turn that fits."""
    micro_batch_size: int = 1
    """Rows in one forward pass of one rank."""
    global_batch_size: int = 8
    """Rows in one optimizer step over all ranks; accumulation follows from it."""
    log_every: int = 10
    """Steps between two lines of `train.log`."""
    seed: int = 42
    """Seed of weights, dropout and the order of the data."""

    def __post_init__(self) -> None:
        require_at_least(self, seq_len=2, micro_batch_size=1, global_batch_size=1, log_every=1)
        if not self.run or self.run.startswith("/") or ".." in self.run.split("/"):
            raise UserError(
                f"run={self.run!r}: must be a name below the folder of runs, such as run=cpt or run=demo/cpt"
            )

    @property
    def run_dir(self) -> str:
        return f"{self.runs}/{self.run}"
