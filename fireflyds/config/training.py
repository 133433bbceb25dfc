"""A training run: its sections and the whole."""

import math
from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from fireflyds.config.cluster import ClusterConfig
from fireflyds.config.data import DataConfig
from fireflyds.config.enums import ModelInit, Offload, PlanFormat, Precision, TrackerKind, WandbMode, require_at_least
from fireflyds.config.optim import OptimConfig
from fireflyds.config.tuning import TuningConfig
from fireflyds.config.validation import ValidationConfig
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
class ObjectiveConfig:
    name: str = MISSING
    """Entry of `fireflyds/train/objectives`."""


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
    json: str = ""
    """A DeepSpeed JSON of another project: what is typed here must say the same, what DeepSpeed no longer has is refused,
    the rest is passed on (and printed)."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Further DeepSpeed configuration, treated in the same way."""

    def __post_init__(self) -> None:
        if self.stage not in (0, 1, 2, 3):
            raise UserError(f"zero.stage={self.stage}: must be 0, 1, 2 or 3")
        if self.offload_param is not Offload.none and self.stage != 3:
            raise UserError(f"zero.offload_param={self.offload_param.name} needs zero.stage=3, got {self.stage}")
        if self.offload_optimizer is not Offload.none and self.stage == 0:
            raise UserError("zero.offload_optimizer needs zero.stage of at least 1, got 0")


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
    start_timeout_minutes: float = 10.0
    """At the start the ranks wait for each other for so long; those that have not come are named."""
    network_interface: str = ""
    """Network interface that NCCL and gloo use between hosts, such as `ib0`, or several with commas; empty: they choose."""
    local_cache: str = ""
    """Folder on every host's own disk: base model and token store are copied there once and read from there, within
    `hardware.timeout_minutes`. Empty: they are read where they are."""
    peak_tflops: float | None = None
    """Peak of one device for matrix products in the precision trained in, in TFLOP/s: what MFU is measured against.
    Unset: the published peak of a known GPU; no MFU for another device."""

    def __post_init__(self) -> None:
        require_at_least(self, "hardware.", loss_scale_window=1, hysteresis=1, min_loss_scale=2.0**-14)
        for key in ("timeout_minutes", "start_timeout_minutes"):
            if not 0 < getattr(self, key) < math.inf:
                raise UserError(f"hardware.{key}={getattr(self, key)}: must be a number greater than 0")
        if self.peak_tflops is not None and not 0 < self.peak_tflops < math.inf:
            raise UserError(f"hardware.peak_tflops={self.peak_tflops}: must be a number greater than 0, or null")
        if not 0 <= self.initial_scale_power <= 32 or 2.0**self.initial_scale_power < self.min_loss_scale:
            raise UserError(
                f"hardware.initial_scale_power={self.initial_scale_power}: must be from 0 to 32, and 2 to it at least "
                f"hardware.min_loss_scale={self.min_loss_scale:g}"
            )


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    kind: TrackerKind = MISSING
    """`none` (files only), `wandb` or `tensorboard` (rank 0 only)."""
    project: str = "fireflyds"
    """W&B project."""
    entity: str | None = None
    """W&B team or user."""
    mode: WandbMode = WandbMode.online
    """W&B mode: `online`, `offline` or `disabled`."""
    group: str | None = None
    """W&B group; unset: the folder part of `run`, such as `demo` of `demo/cpt`."""
    tags: list[str] = field(default_factory=list)
    """W&B tags."""
    job_type: str = "train"
    """W&B job type."""
    finish_seconds: float = 60.0
    """At the end a tracker is waited for at most so long; what is not sent by then stays on the disk."""

    def __post_init__(self) -> None:
        if not self.finish_seconds > 0:
            raise UserError(f"tracking.finish_seconds={self.finish_seconds:g}: must be greater than 0")


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    every: int = 500
    """Save every so many steps; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept."""
    keep_every: int | None = None
    """Checkpoints of every so many steps are kept beyond these."""
    best_metric: str = ""
    """A number of `metrics.jsonl` (such as `loss`), or of `validation.jsonl` (`validation/bits_per_byte/en`, where
    `validation.every` and `checkpoint.every` meet), whose lowest checkpoint is kept too."""
    max_gib: float | None = None
    """Beyond this size of all checkpoints the oldest go; the newest always stays."""
    background: bool = True
    """Training goes on while a checkpoint is written; it needs memory on the host for one copy of the rank's share."""

    def __post_init__(self) -> None:
        require_at_least(self, "checkpoint.", every=1, keep=1, keep_every=1, max_gib=0)


@dataclass(kw_only=True, slots=True)
class RecoveryConfig:
    """What a run does about trouble."""

    max_skipped: int = 5
    """A step whose loss or gradients are not finite is skipped; after so many in a row the run ends, naming the tensor
    and the documents."""
    rollback_above: float | None = None
    """A loss above so many times the mean of the last steps is a spike: back to the newest checkpoint, and the data since
    then is passed over. Unset: never."""
    max_rollbacks: int = 3
    """A spike after so many rollbacks ends the run."""
    heartbeat_seconds: float = 60.0
    """A rank that is silent for so long ends the run."""

    def __post_init__(self) -> None:
        require_at_least(self, "recovery.", max_skipped=1, max_rollbacks=1, heartbeat_seconds=5)
        if self.rollback_above is not None and self.rollback_above <= 1:
            raise UserError(f"recovery.rollback_above={self.rollback_above}: must be greater than 1, such as 2")


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    run: str = MISSING
    """Name of the run: its folder and its identity. The same name resumes."""
    runs: str = "runs"
    """Folder that holds the runs."""
    model: ModelConfig = MISSING
    data: DataConfig = MISSING
    objective: ObjectiveConfig = MISSING
    tuning: TuningConfig = MISSING
    zero: ZeroConfig = MISSING
    optim: OptimConfig = MISSING
    hardware: HardwareConfig = MISSING
    tracking: TrackingConfig = MISSING
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    recovery: RecoveryConfig = field(default_factory=RecoveryConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
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

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches of one rank in a step.

        Raises:
            UserError: `global_batch_size` is no multiple of `micro_batch_size` times the number of ranks.
        """
        rows = self.micro_batch_size * world_size
        if self.global_batch_size % rows:
            raise UserError(
                f"global_batch_size={self.global_batch_size}: must be a multiple of micro_batch_size={self.micro_batch_size} "
                f"x {world_size} ranks = {rows}. Nearest: {max(rows, self.global_batch_size // rows * rows)}"
            )
        return self.global_batch_size // rows


@dataclass(kw_only=True, slots=True)
class PlanConfig(TrainConfig):
    run: str = "plan"
    """As in `train`; not needed here."""
    cluster: ClusterConfig = MISSING
    format: PlanFormat = PlanFormat.table
    """`table` for people, `json` for programs."""
