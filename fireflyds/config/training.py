"""A training run: its sections and the whole."""

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from fireflyds.config.cluster import ClusterConfig
from fireflyds.config.data import DataConfig
from fireflyds.config.optim import OptimConfig
from fireflyds.config.tuning import TuningConfig
from fireflyds.config.values import (
    ModelInit,
    Offload,
    PlanFormat,
    Precision,
    Tracker,
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
    """Hugging Face configuration values, `model_type` among them: what `scratch` makes, and what `launch/plan.py` counts
    where `model.path` is empty. A model read from `model.path` must agree with them."""
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """Stretches the context, in Hugging Face's words: `{rope_type: linear, factor: 4}`, `dynamic`, `yarn`, `llama3`; or
    `{rope_type: ntk, alpha: 3}` and `{rope_type: ntk_auto, seq_len: 8192}`, which raise `rope_theta`."""
    base_vocab_size: int | None = None
    """Rows of the vocabulary before its expansion; `new_rows` trains those behind. Unset: what `launch/expand.py` left
    in the model's `config.json`."""

    def __post_init__(self) -> None:
        require_at_least(self, "model.", base_vocab_size=1)
        if self.init is ModelInit.scratch and not (self.tokenizer and self.architecture.get("model_type")):
            raise UserError("model.init=scratch needs model.tokenizer and model.architecture.model_type; give both")

    @property
    def tokenizer_path(self) -> str:
        """Raises `UserError` when neither a tokenizer nor a model is given."""
        if not (self.tokenizer or self.path):
            raise UserError(
                "model.path is empty: a pretrained model needs its Hugging Face directory. Give model.path=<dir>"
            )
        return self.tokenizer or self.path


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
class HardwareConfig:
    precision: Precision = MISSING
    """Number format; `auto`: bf16 on a GPU that has it, fp16 on an older GPU, fp32 on the CPU."""
    attention: str = "auto"
    """Implementation of packed attention (`launch/doctor.py` lists them); `auto`: the best that runs here."""
    initial_scale_power: int = 16
    """fp16: the loss scale starts at 2 to this power."""
    loss_scale_window: int = 1000
    """fp16: steps without overflow before the loss scale doubles."""
    hysteresis: int = 2
    """fp16: overflows before the loss scale halves."""
    min_loss_scale: float = 1.0
    """fp16: an overflow at this scale ends the run, naming the tensor."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass to save memory."""
    timeout_minutes: float = 30.0
    """A collective that takes longer ends the run."""
    peak_tflops: float | None = None
    """Peak of one device for matrix products in the precision trained in, in TFLOP/s: what MFU is measured against.
    Unset: the published peak of a known GPU; no MFU for another device."""

    def __post_init__(self) -> None:
        require_at_least(self, "hardware.", loss_scale_window=1, hysteresis=1, min_loss_scale=2.0**-14)
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise UserError(f"hardware.peak_tflops={self.peak_tflops}: must be a number greater than 0, or null")
        if not 0 <= self.initial_scale_power <= 32 or 2.0**self.initial_scale_power < self.min_loss_scale:
            raise UserError(
                f"hardware.initial_scale_power={self.initial_scale_power}: must be from 0 to 32, and 2 to it at least "
                f"hardware.min_loss_scale={self.min_loss_scale:g}"
            )


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
    init_from: str = ""
    """An earlier run to start from: its trained weights, with a new schedule (not resuming, which is the same `run`)."""
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
        if self.init_from == self.run:
            raise UserError(f"init_from={self.init_from}: is the run itself; give another run= to start from it")

    @property
    def run_dir(self) -> str:
        return f"{self.runs}/{self.run}"


@dataclass(kw_only=True, slots=True)
class PlanConfig(TrainConfig):
    run: str = "plan"
    """As in `train`; not needed here."""
    cluster: ClusterConfig = MISSING
    format: PlanFormat = PlanFormat.table
    """`table` for people, `json` for programs."""
