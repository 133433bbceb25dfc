"""Options of `doctor`: checks of the machines, their software and the inputs of a training run."""

from dataclasses import dataclass, field

from fireflyds.config.enums import PlanFormat, Precision, require_at_least
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class DoctorConfig:
    """Keys of the verb `doctor`."""

    format: PlanFormat = PlanFormat.table
    """`table` for people, `json` for programs: one line."""
    runs: str = "runs"
    """Folder of the runs; the speed of its disk and its visibility on every rank are tested."""
    data: str = ""
    """Token store to check against the tokenizer; empty: none."""
    tokenizer: str = ""
    """Tokenizer directory or `.model` to check against `model` and `data`; empty: that of `model`."""
    timeout: float = 60.0
    """Seconds to wait for a rank, the disk or the all-reduce before it is reported as unresponsive."""
    shared_timeout: float = 10.0
    """Seconds within which a file that rank 0 writes to `runs` must be visible on every rank."""
    all_reduce_mib: int = 64
    """Size of the tested all-reduce in MiB."""
    all_reduce_repeats: int = 5
    """Repetitions of the all-reduce; the median is reported."""
    disk_mib: int = 256
    """Size of the file that is written to `runs` and read back, in MiB."""
    min_free_gib: float = 100.0
    """Less free space for `runs`, in GiB, is a warning."""
    min_disk_mib_s: float = 100.0
    """A lower disk throughput, in MiB/s, is a warning."""
    min_bus_gb_s: float = 1.0
    """A lower bus bandwidth of the NCCL all-reduce, in GB/s, is a warning."""
    max_clock_skew: float = 1.0
    """A larger clock difference between hosts, in seconds, is a warning."""
    packing: bool = False
    """Verify on `model` that packed documents give the same results as single documents, for every attention
    implementation that runs here."""
    model: str = ""
    """Hugging Face directory to check: complete files, and agreement with `tokenizer` and `data`; also the model of
    `packing`."""
    precision: Precision = Precision.auto
    """Precision of the packing check; `fp32` detects the smallest differences."""
    device: str = ""
    """`cuda`, `cuda:1`, `cpu`; empty: the first GPU, or the CPU."""
    layers: int | None = None
    """Number of first layers to check, for a model whose gradients do not fit in memory; unset: all."""
    documents: list[int] = field(default_factory=lambda: [7, 1, 130, 64, 300])
    """Lengths of the packed documents, in tokens."""
    seed: int = 0
    """Random seed of the documents' tokens."""

    def __post_init__(self) -> None:
        require_at_least(
            self, layers=1, timeout=1, shared_timeout=0, all_reduce_mib=1, all_reduce_repeats=1, disk_mib=1
        )
        require_at_least(self, min_free_gib=0, min_disk_mib_s=0, min_bus_gb_s=0, max_clock_skew=0)
        if not self.runs:
            raise UserError("is empty", key="runs", remedy="Give the folder of the runs, such as runs=runs")
        if self.packing and not self.model:
            raise UserError("needs a model", key="packing", value="true", remedy="Give model=<Hugging Face directory>")
        if not self.documents or min(self.documents) < 1:
            raise UserError(
                "must be lengths of at least 1",
                key="documents",
                value=self.documents,
                remedy="Give some, such as [7,1,130]",
            )
        if max(self.documents) < 2:
            raise UserError(
                "one token has none after it to learn",
                key="documents",
                value=self.documents,
                remedy="Give one of at least 2",
            )
