"""Options of `export`: conversion of a run to a Hugging Face directory."""

from dataclasses import dataclass

from omegaconf import MISSING

from fireflyds.config.enums import ExportWhat, Precision
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class ExportConfig:
    """Keys of the verb `export`."""

    run: str = MISSING
    """Name of the run to export."""
    runs: str = "runs"
    """Folder that contains the runs."""
    out: str = ""
    """Hugging Face directory to write; empty: `<runs>/<run>/export`."""
    what: ExportWhat = ExportWhat.merged
    """`merged`: the whole model with merged adapters; `adapter`: files for PEFT's `PeftModel.from_pretrained`, written
    to `<runs>/<run>/adapter`."""
    step: int | None = None
    """Step of the checkpoint to export; unset: the newest complete one."""
    dtype: Precision = Precision.auto
    """Number format of the written weights; `auto`: that of the trained model. Adapters are always float32."""
    verify: bool = True
    """Load the exported model with plain transformers and compare its logits with the trained model's (not for
    `what=adapter`, which copies the trained tensors)."""
    hub: str = ""
    """Name on the Hugging Face Hub (`<owner>/<name>`) that the directory is uploaded to."""
    hub_private: bool = True
    """Whether a repository that `hub` makes is private."""
    artifact: bool = False
    """Upload the directory as an artifact of the run's W&B run (runs with `tracking=wandb`)."""

    def __post_init__(self) -> None:
        if self.what is ExportWhat.adapter and self.dtype is not Precision.auto:
            raise UserError(
                "what=adapter writes float32",
                key="dtype",
                value=self.dtype.name,
                remedy="Leave dtype out, or use what=merged",
            )
