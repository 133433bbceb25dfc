"""`export`: a run as a Hugging Face directory."""

from dataclasses import dataclass

from omegaconf import MISSING

from fireflyds.config.enums import ExportWhat, Precision


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
