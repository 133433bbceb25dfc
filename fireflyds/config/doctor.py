"""`doctor`: is this machine fit to train?"""

from dataclasses import dataclass, field

from fireflyds.config.enums import PlanFormat, Precision, require_at_least
from fireflyds.errors import UserError


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
