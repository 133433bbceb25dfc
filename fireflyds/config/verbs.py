"""The other verbs."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from fireflyds.config.enums import ExportWhat, PlanFormat, Precision, PromptStyle, require_at_least
from fireflyds.errors import UserError


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
class ExportConfig:
    run: str = MISSING
    """The run to export."""
    runs: str = "runs"
    """Folder that holds the runs."""
    out: str = ""
    """Hugging Face directory to write; empty: `<runs>/<run>/export`."""
    what: ExportWhat = ExportWhat.merged
    """`merged`: the whole model; `adapter`: what PEFT's `PeftModel.from_pretrained` reads, into `<runs>/<run>/adapter`."""
    step: int | None = None
    """Checkpoint to export; unset: the newest whole one."""
    dtype: Precision = Precision.auto
    """Number format of the written weights; `auto`: that of the trained model."""
    verify: bool = True
    """Load what was written with plain transformers and compare logits with the trained model."""
    artifact: bool = False
    """Give the directory to the run's W&B run as an artifact (runs with `tracking=wandb`)."""


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
class DoctorConfig:
    format: PlanFormat = PlanFormat.table
    """`table` for people, `json` for programs: one line."""
    runs: str = "runs"
    """Folder of the runs: its disk is tried, and whether every rank sees it."""
    data: str = ""
    """Token store that must agree with the tokenizer; empty: none."""
    tokenizer: str = ""
    """Tokenizer directory or `.model` that must agree with `model` and `data`; empty: that of `model`."""
    timeout: float = 60.0
    """Seconds to wait for a rank, the disk or the all-reduce before it is called silent."""
    shared_timeout: float = 10.0
    """Seconds within which every rank must see a file of rank 0 in `runs`."""
    all_reduce_mib: int = 64
    """MiB summed over the ranks."""
    all_reduce_repeats: int = 5
    """Times it is summed; the median counts."""
    disk_mib: int = 256
    """MiB written to `runs` and read back."""
    min_free_gib: float = 100.0
    """Less free space for `runs` is yellow."""
    min_disk_mib_s: float = 100.0
    """A slower disk, in MiB/s, is yellow."""
    min_bus_gb_s: float = 1.0
    """A slower all-reduce of NCCL, in GB/s on the bus, is yellow."""
    max_clock_skew: float = 1.0
    """Clocks of hosts further apart, in seconds, are yellow."""
    packing: bool = False
    """Prove on `model` that packed documents give what each gives alone, for every attention that runs here."""
    model: str = ""
    """Hugging Face directory to examine: whole, and in agreement with `tokenizer` and `data`; and for `packing`."""
    precision: Precision = Precision.auto
    """Number format to examine it in; `fp32` is the sharpest."""
    device: str = ""
    """`cuda`, `cuda:1`, `cpu`; empty: the first GPU, or the CPU."""
    layers: int | None = None
    """Only the first so many layers, for a model whose gradients do not fit; unset: all."""
    documents: list[int] = field(default_factory=lambda: [7, 1, 130, 64, 300])
    """Lengths of the documents laid end to end, in tokens."""
    seed: int = 0
    """Seed of the documents' tokens."""

    def __post_init__(self) -> None:
        require_at_least(
            self, layers=1, timeout=1, shared_timeout=0, all_reduce_mib=1, all_reduce_repeats=1, disk_mib=1
        )
        require_at_least(self, min_free_gib=0, min_disk_mib_s=0, min_bus_gb_s=0, max_clock_skew=0)
        if not self.runs:
            raise UserError("runs='': give the folder of the runs, such as runs=runs")
        if self.packing and not self.model:
            raise UserError("packing=true needs a model: give model=<Hugging Face directory>")
        if not self.documents or min(self.documents) < 1:
            raise UserError(f"documents={self.documents}: give lengths of at least 1, such as [7,1,130]")
        if max(self.documents) < 2:
            raise UserError(f"documents={self.documents}: one token has none after it to learn. Give one of at least 2")


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
    output: str = MISSING
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
