"""Options of a training run: one dataclass per section, and `TrainConfig` of all of them."""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from fireflyds import registry
from fireflyds.config.cluster import ClusterConfig
from fireflyds.config.data import DataConfig
from fireflyds.config.enums import ModelInit, PlanFormat, TrackerKind, WandbMode, require_above, require_at_least
from fireflyds.config.hardware import HardwareConfig, ZeroConfig
from fireflyds.config.optim import OptimConfig
from fireflyds.config.profile import ProfileConfig
from fireflyds.config.tuning import TuningConfig
from fireflyds.config.validation import ValidationConfig
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class ModelConfig:
    """Section `model`: the weights, the tokenizer and the architecture."""

    init: ModelInit = MISSING
    """`pretrained` loads weights from `model.path`; `scratch` initializes weights of `model.architecture` randomly."""
    path: str = ""
    """Hugging Face directory of the model (`init: pretrained`)."""
    tokenizer: str = ""
    """Tokenizer directory or SentencePiece `.model`; empty: `model.path`."""
    architecture: dict[str, Any] = field(default_factory=dict)
    """Hugging Face configuration values, including `model_type`: the model that `scratch` creates, and that
    `launch/plan.py` assumes where `model.path` is empty. With `model.path`, its `config.json` must agree with them."""
    rope_scaling: dict[str, Any] = field(default_factory=dict)
    """Extends the context, as in Hugging Face's `rope_scaling`: `{rope_type: linear, factor: 4}`, `dynamic`, `yarn`,
    `llama3`; or `{rope_type: ntk, alpha: 3}` and `{rope_type: ntk_auto, seq_len: 8192}`, which raise `rope_theta`."""
    base_vocab_size: int | None = None
    """Number of embedding rows before the vocabulary expansion; `new_rows` trains the rows from there on. Unset: the
    value that `launch/expand.py` wrote to the model's `config.json`."""

    def __post_init__(self) -> None:
        require_at_least(self, "model.", base_vocab_size=1)
        if self.init is ModelInit.scratch and not (self.tokenizer and self.architecture.get("model_type")):
            raise UserError(
                "needs model.tokenizer and model.architecture.model_type",
                key="model.init",
                value="scratch",
                remedy="Give both",
            )

    @property
    def tokenizer_path(self) -> str:
        """`tokenizer`, or `path` where it is empty. Raises `UserError` where both are empty."""
        if not (self.tokenizer or self.path):
            raise UserError(
                "is empty; a pretrained model needs its Hugging Face directory",
                key="model.path",
                remedy="Give model.path=<dir>",
            )
        return self.tokenizer or self.path


@dataclass(kw_only=True, slots=True)
class ObjectiveConfig:
    """Section `objective`: the training objective."""

    name: str = MISSING
    """Training objective: an entry of `fireflyds/train/objectives`."""
    router_aux_loss: float = 0.0
    """Coefficient of the loss that balances the load of experts (Switch Transformer, arXiv 2101.03961), over the
    learned tokens of a micro-batch and all layers together, as in transformers; 0: none. `loss` is without it."""
    router_z_loss: float = 0.0
    """Coefficient of the router's z-loss (ST-MoE, arXiv 2202.08906): the mean of the squared logsumexp of its logits
    over learned tokens and layers; 0: none. `loss` is without it."""

    def __post_init__(self) -> None:
        registry.require("fireflyds.train.objectives", self.name, "objective.name")
        require_at_least(self, "objective.", router_aux_loss=0, router_z_loss=0)

    @property
    def has_router_losses(self) -> bool:
        """True where a loss of the routers is added."""
        return bool(self.router_aux_loss or self.router_z_loss)


@dataclass(kw_only=True, slots=True)
class TrackingConfig:
    """Section `tracking`: the tracker that receives the metrics."""

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
    """Maximum wait for the tracker at the end of the run, in seconds; data not uploaded by then stay on the disk."""

    def __post_init__(self) -> None:
        require_above(self, "tracking.", finite=False, finish_seconds=0)


@dataclass(kw_only=True, slots=True)
class CheckpointConfig:
    """Section `checkpoint`: when checkpoints are written, and which are kept."""

    every: int = 500
    """Steps between two checkpoints; the last step is always saved."""
    keep: int = 2
    """Number of newest checkpoints that are kept."""
    keep_every: int | None = None
    """Checkpoints of steps divisible by this number are kept too; unset: none."""
    best_metric: str = ""
    """Metric of `metrics.jsonl` (such as `loss`), or of `validation.jsonl` (such as `validation/bits_per_byte/en`, at
    steps of both `validation.every` and `checkpoint.every`); the checkpoint with its lowest value is kept too."""
    max_gib: float | None = None
    """Maximum size of all checkpoints in GiB: beyond it the oldest are deleted; the newest is always kept."""
    background: bool = True
    """Write checkpoints while training continues; needs host memory for a copy of the rank's partition."""

    def __post_init__(self) -> None:
        require_at_least(self, "checkpoint.", every=1, keep=1, keep_every=1, max_gib=0)


@dataclass(kw_only=True, slots=True)
class RecoveryConfig:
    """Handling of non-finite steps, loss spikes and unresponsive ranks."""

    max_skipped: int = 5
    """A step with non-finite loss or gradients is skipped; after this many in a row the run ends with an error that
    names the tensor and the documents."""
    rollback_above: float | None = None
    """A loss above this multiple of the mean of the last steps is a spike: the run returns to the newest checkpoint and
    skips the data since then. Unset: no rollback."""
    max_rollbacks: int = 3
    """A spike after this many rollbacks ends the run."""
    heartbeat_seconds: float = 60.0
    """Seconds without a heartbeat of a rank after which the run ends."""

    def __post_init__(self) -> None:
        require_at_least(self, "recovery.", max_skipped=1, max_rollbacks=1, heartbeat_seconds=5)
        require_above(self, "recovery.", finite=False, rollback_above=1)


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """Keys of the verb `train`."""

    run: str = MISSING
    """Name of the run and of its folder below `runs`. A run started with an existing name is resumed."""
    runs: str = "runs"
    """Folder that contains the runs."""
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
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    init_from: str = ""
    """Earlier run whose trained weights initialize this run, with a new schedule (to resume a run, give the same `run`
    instead)."""
    packing: bool = True
    """Run the documents of a row in one forward pass. `false`: every document runs by itself through transformers' own
    forward pass, exact for any causal model, and slow."""
    seq_len: int = 1024
    """Tokens per packed row; longer documents are split at the end of a sentence, dialogues at a turn of the
    user."""
    micro_batch_size: int = 1
    """Packed rows per rank in one forward pass."""
    global_batch_size: int = 8
    """Packed rows per optimizer step over all ranks; the number of gradient accumulation steps follows from it."""
    log_every: int = 10
    """Steps between two lines of `train.log`."""
    seed: int = 42
    """Random seed of weights, dropout and data order."""

    def __post_init__(self) -> None:
        require_at_least(self, seq_len=2, micro_batch_size=1, global_batch_size=1, log_every=1)
        if not self.packing and self.hardware.attention != "auto":
            raise UserError(
                "packing=false runs transformers' own attention",
                key="hardware.attention",
                value=self.hardware.attention,
                remedy="Leave it out, or give packing=true",
            )
        if not self.run or self.run.startswith("/") or ".." in self.run.split("/"):
            raise UserError(
                "must be a name below the folder of runs",
                key="run",
                value=f"{self.run!r}",
                remedy="Give a name such as run=cpt or run=demo/cpt",
            )
        if self.init_from == self.run:
            raise UserError(
                "is the run itself", key="init_from", value=self.init_from, remedy="Give another run= to start from it"
            )

    @property
    def run_dir(self) -> str:
        """Folder of the run, `<runs>/<run>`."""
        return f"{self.runs}/{self.run}"

    def accumulation_steps(self, world_size: int) -> int:
        """Micro-batches per rank and optimizer step.

        Raises:
            UserError: `global_batch_size` is not a multiple of `micro_batch_size` times the number of ranks.
        """
        rows = self.micro_batch_size * world_size
        if self.global_batch_size % rows:
            raise UserError(
                f"must be a multiple of micro_batch_size={self.micro_batch_size} x {world_size} ranks = {rows}",
                key="global_batch_size",
                value=self.global_batch_size,
                remedy=f"Nearest: {max(rows, self.global_batch_size // rows * rows)}",
            )
        return self.global_batch_size // rows


@dataclass(kw_only=True, slots=True)
class PlanConfig(TrainConfig):
    """Keys of the verb `plan`: those of `train`, the cluster and the output format."""

    run: str = "plan"
    """As in `train`; optional here."""
    cluster: ClusterConfig = MISSING
    format: PlanFormat = PlanFormat.table
    """Output format: `table` for people, `json` for programs."""
