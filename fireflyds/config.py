"""Every knob, with its default and its meaning. Hydra composes these from `conf/`; nothing else holds a default.

A field's docstring is its entry in the option reference (`conf/README.md`) and in `-h`.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

from fireflyds.errors import UserError


class Precision(Enum):
    auto = 0
    fp32 = 1
    bf16 = 2
    fp16 = 3


class Schedule(Enum):
    cosine = 0
    linear = 1
    constant = 2
    constant_with_warmup = 3


class ModelInit(Enum):
    pretrained = 0
    scratch = 1


class TuningMethod(Enum):
    full = 0
    lora = 1
    qlora = 2


class Offload(Enum):
    none = 0
    cpu = 1


class RowInit(Enum):
    mean = 0
    random = 1


class WandbMode(Enum):
    online = 0
    offline = 1
    disabled = 2


class Tracker(Enum):
    none = 0
    wandb = 1


class TextSplit(Enum):
    line = 0
    paragraph = 1
    file = 2


class PromptStyle(Enum):
    auto = 0
    plain = 1
    chat = 2


def require_at_least(config: Any, **least: int) -> None:
    """Raises `UserError` for the first field of `config` below its least value."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise UserError(f"{name}={value}: must be at least {bound}")


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
class SourceConfig:
    path: str = MISSING
    """File, folder or glob: .txt .jsonl .json .csv .tsv .parquet."""
    domain: str = "text"
    """Name under which its tokens are counted, mixed and measured."""
    format: str = "auto"
    """Record layout: an entry of `fireflyds/data/formats`, or `auto` (what is chosen is printed)."""
    split: TextSplit = TextSplit.line
    """What one document is in a .txt file: a `line`, a `paragraph` (blank line between) or the `file`."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    store: str = ""
    """Token store directory: `prepare` writes it (unless `out` says otherwise), `train` reads it."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Raw files that `prepare` reads."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the training tokens by domain; empty: as much as there is of each."""

    def __post_init__(self) -> None:
        for domain, weight in self.weights.items():
            if weight <= 0:
                raise UserError(
                    f"data.weights.{domain}={weight}: a weight must be greater than 0. Leave the domain out instead"
                )


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


@dataclass(kw_only=True, slots=True)
class SynthesizeConfig:
    out: str = MISSING
    """Folder to write: documents, dialogues and questions."""
    corpus: str = ""
    """A person's own text (file, folder or glob) in place of the generated Chinese documents."""
    zh_bytes: int = 2_200_000
    """UTF-8 bytes of generated Chinese documents."""
    en_bytes: int = 1_100_000
    """UTF-8 bytes of generated English documents."""
    num_entities: int = 48
    """Invented things of each kind."""
    num_questions: int = 240
    """Multiple-choice questions held out from the dialogues."""
    heldout_documents: int = 150
    """Documents per language kept for bits per byte."""
    seed: int = 20240229
    """The same seed writes the same bytes."""


@dataclass(kw_only=True, slots=True)
class LearnConfig:
    corpus: str = MISSING
    """Text to learn from: file, folder or glob."""
    out: str = MISSING
    """Tokenizer directory to write."""
    vocab_size: int = 32_000
    """Pieces in all, special and byte pieces included."""
    max_piece_length: int = 16
    """Longest piece, in characters."""

    def __post_init__(self) -> None:
        require_at_least(self, vocab_size=300, max_piece_length=1)


@dataclass(kw_only=True, slots=True)
class ExpandConfig:
    base: str = MISSING
    """Hugging Face directory of the model, or a tokenizer `.model` alone."""
    out: str = MISSING
    """Directory to write."""
    pieces: str = ""
    """Pieces to merge: a SentencePiece `.model`, or a text file with one piece a line."""
    corpus: str = ""
    """Text to learn pieces from: file, folder or glob. Also what the report is measured on."""
    num_pieces: int = 0
    """Pieces to learn from `corpus`."""
    max_piece_length: int = 8
    """Longest learnt piece, in characters."""
    cure: bool = True
    """Drop pieces without Han, add the intermediates that make every new piece reachable; false: merge as given."""
    vocab_multiple: int = 64
    """The vocabulary is filled with further Han characters up to a multiple of this."""
    init: RowInit = RowInit.mean
    """New embedding rows: `mean` of the piece's old tokens, or `random` (mean and variance of the old rows)."""
    seed: int = 42
    """Seed of `init=random`."""

    def __post_init__(self) -> None:
        if bool(self.pieces) == bool(self.num_pieces):
            raise UserError(
                f"expand: give either pieces=<.model or list> or num_pieces=<N> with corpus=<files>, "
                f"got pieces={self.pieces!r}, num_pieces={self.num_pieces}"
            )
        if self.num_pieces and not self.corpus:
            raise UserError(
                f"num_pieces={self.num_pieces} needs text to learn from: give corpus=<file, folder or glob>"
            )
        require_at_least(self, num_pieces=0, vocab_multiple=1, max_piece_length=1)


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    data: DataConfig = MISSING
    tokenizer: str = MISSING
    """Hugging Face directory, or a SentencePiece `.model`."""
    out: str = ""
    """Token store to write; empty: `data.store`."""
    template: str = "firefly"
    """Chat template of dialogues: an entry of `fireflyds/data/templates`."""
    workers: int = 0
    """Encoding processes; 0: one per core."""

    def __post_init__(self) -> None:
        require_at_least(self, workers=0)


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    run: str = MISSING
    """The run to export."""
    runs: str = "runs"
    """Folder that holds the runs."""
    out: str = ""
    """Hugging Face directory to write; empty: `<runs>/<run>/export`."""
    step: int | None = None
    """Checkpoint to export; unset: the newest whole one."""
    dtype: Precision = Precision.auto
    """Number format of the written weights; `auto`: that of the trained model."""
    verify: bool = True
    """Load what was written with plain transformers and compare logits with the trained model."""


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    model: str = MISSING
    """Hugging Face directory."""
    tasks: list[str] = field(default_factory=lambda: ["bits_per_byte"])
    """Entries of `fireflyds/evaluation/tasks`."""
    out: str = ""
    """Folder for `scores.json`; empty: `<model>/eval`."""
    texts: dict[str, str] = field(default_factory=dict)
    """Held-out text for bits per byte: name to file, folder or glob."""
    questions: str = ""
    """Questions of `multiple_choice`: JSON lines with `question`, `choices`, `answer` (an index)."""
    cmmlu: str = ""
    """Folder of CMMLU with `dev/` and `test/`."""
    subjects: list[str] = field(default_factory=list)
    """CMMLU subjects; empty: all."""
    num_shots: int = 0
    """Worked examples put before each CMMLU question."""
    limit: int | None = None
    """At most this many documents or questions per task."""
    prompt: PromptStyle = PromptStyle.auto
    """`chat` wraps questions in the model's chat template, `plain` does not, `auto`: chat where there is one."""
    max_tokens: int = 4096
    """Tokens in one forward pass."""

    def __post_init__(self) -> None:
        require_at_least(self, max_tokens=2, limit=1, num_shots=0)
        if not self.tasks:
            raise UserError("tasks=[]: nothing to do. Name entries of fireflyds/evaluation/tasks")


@dataclass(kw_only=True, slots=True)
class ChatConfig:
    model: str = MISSING
    """Hugging Face directory with a chat template."""
    prompt: str = ""
    """Answer this one message and leave; empty: a conversation."""
    system: str = ""
    """System message."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.35
    """0 takes the likeliest token."""
    top_p: float = 0.9
    """Nucleus sampling."""
    seed: int = 42
    """Seed of sampling."""

    def __post_init__(self) -> None:
        require_at_least(self, max_new_tokens=1, temperature=0)


@dataclass(kw_only=True, slots=True)
class StageConfig:
    name: str = MISSING
    """Name of the stage: its key in `summary.json`."""
    verb: str = MISSING
    """A file of `launch/`."""
    ranks: int = 1
    """More than one: started by `deepspeed --num_gpus`."""
    overrides: list[str] = field(default_factory=list)
    """What is typed after the verb."""
    makes: str = MISSING
    """The file that stands when the stage is done."""


@dataclass(kw_only=True, slots=True)
class RoadConfig:
    name: str = MISSING
    """Name of the road. Its folder is `runs/<name>`."""
    stages: list[StageConfig] = field(default_factory=list)
    """Verbs in order."""

    @property
    def out(self) -> str:
        return f"runs/{self.name}"


@dataclass(kw_only=True, slots=True)
class DemoConfig:
    road: RoadConfig = MISSING
    corpus: str = ""
    """A person's own text (.txt .jsonl .json .csv .parquet; file, folder or glob) instead of the generated Chinese."""


VERBS: dict[str, type] = {
    "synthesize": SynthesizeConfig,
    "learn": LearnConfig,
    "expand": ExpandConfig,
    "prepare": PrepareConfig,
    "train": TrainConfig,
    "export": ExportConfig,
    "evaluate": EvaluateConfig,
    "chat": ChatConfig,
    "demo": DemoConfig,
}
