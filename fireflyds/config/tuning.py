"""What trains: the method, its adapters, and the rows of the vocabulary."""

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from fireflyds.config.enums import TrainableRows, TuningMethod
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class TuningConfig:
    method: TuningMethod = MISSING
    """`full`, `freeze` (parameters named by `trainable` alone), `lora` (adapters on a 16/32-bit base) or `qlora`
    (adapters on a quantised base)."""
    embeddings: TrainableRows = MISSING
    """Rows of the input embeddings that train, under any method: `frozen`, `new_rows` (those an expansion added) or
    `all`."""
    head: TrainableRows = MISSING
    """Rows of the output head that train, as `embeddings`; a tied head is the embeddings and says the same."""
    trainable: list[str] = field(default_factory=list)
    """Regular expressions of `freeze`: parameters whose name contains a match train."""
    r: int = 64
    """Rank of the adapters."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / r (with `use_rslora`: alpha / sqrt(r))."""
    dropout: float = 0.05
    """Dropout in front of the adapters."""
    target_modules: list[str] = field(default_factory=list)
    """Linear layers that get adapters: names, or regular expressions of whole dotted names; empty: every linear layer
    of the family's blocks."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    use_dora: bool = False
    """Magnitudes trained beside directions (DoRA, arXiv 2402.09353)."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of the adapters' B over that of A (LoRA+, arXiv 2402.12354; 16 there)."""
    bits: int = 4
    """Bits of `qlora`'s base: 4 (NF4, double quantisation) or 8 (LLM.int8)."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"tuning.r={self.r}: the rank must be at least 1")
        if not 0 <= self.dropout < 1:
            raise UserError(f"tuning.dropout={self.dropout}: must be in [0, 1)")
        if self.bits not in (4, 8):
            raise UserError(f"tuning.bits={self.bits}: must be 4 or 8")
        for name in ("alpha", "loraplus_lr_ratio"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"tuning.{name}={getattr(self, name)}: must be greater than 0")
        if self.bits == 8 and self.method is not TuningMethod.qlora:
            raise UserError(
                f"tuning.bits=8: only tuning=qlora has a quantised base, this is {self.method.name}. Leave it out"
            )
        of_adapters = {"use_rslora": False, "use_dora": False, "loraplus_lr_ratio": 1.0}
        for name, neutral in of_adapters.items():
            if getattr(self, name) != neutral and not self.has_adapters:
                raise UserError(
                    f"tuning.{name}={getattr(self, name)}: tuning={self.method.name} has no adapters. Use tuning=lora or qlora"
                )
        if self.trainable and self.method is not TuningMethod.freeze:
            raise UserError(
                f"tuning.trainable={list(self.trainable)}: only tuning=freeze reads it, this is {self.method.name}. "
                "Use tuning=freeze, or leave it out"
            )

    @property
    def has_adapters(self) -> bool:
        return self.method in (TuningMethod.lora, TuningMethod.qlora)
