"""Options of the trainable parameters: the method, its adapters, and the rows of the vocabulary."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from fireflyds.config.enums import TrainableRows, TuningMethod, require_above
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class TuningConfig:
    """Section `tuning`: the method, its adapters, and the trainable rows of the vocabulary."""

    method: TuningMethod = MISSING
    """`full`, `freeze` (only the parameters matched by `trainable` train), `lora` (adapters on a 16/32-bit base) or
    `qlora` (adapters on a quantised base)."""
    embeddings: TrainableRows = MISSING
    """Trainable rows of the input embeddings, with any method: `frozen`, `new_rows` (those added by the expansion) or
    `all`."""
    head: TrainableRows = MISSING
    """Trainable rows of the output head, as in `embeddings`; with a tied head both must be equal."""
    trainable: list[str] = field(default_factory=list)
    """`freeze`: regular expressions; parameters whose name contains a match are trainable."""
    r: int = 64
    """Rank of the adapters."""
    alpha: float = 16.0
    """Adapters are scaled by alpha / r (with `use_rslora`: alpha / sqrt(r))."""
    dropout: float = 0.05
    """Dropout probability on the input of the adapters."""
    target_modules: list[str] = field(default_factory=list)
    """Linear layers with adapters: names, or regular expressions of whole dotted names; empty: every linear layer of
    the transformer blocks."""
    use_rslora: bool = False
    """Rank-stabilised scaling (arXiv 2312.03732)."""
    use_dora: bool = False
    """Train magnitudes and directions separately (DoRA, arXiv 2402.09353)."""
    experts: bool = False
    """Adapters on the matrices of experts too, one of rank `r` for each expert. They have no dropout and no DoRA, so
    `dropout=0` is required with it. Under `qlora` the experts themselves stay in 16 bits."""
    loraplus_lr_ratio: float = 1.0
    """Learning rate of the adapters' B divided by that of A (LoRA+, arXiv 2402.12354; 16 in the paper)."""
    bits: int = 4
    """Bits per weight of the base of `qlora`: 4 (NF4, double quantisation) or 8 (LLM.int8)."""

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(
                "the rank must be at least 1", key="tuning.r", value=self.r, remedy="Give 1 or more, such as 16"
            )
        if not 0 <= self.dropout < 1:
            raise UserError(
                "must be in [0, 1)", key="tuning.dropout", value=self.dropout, remedy="Give 0 or a share such as 0.05"
            )
        if self.bits not in (4, 8):
            raise UserError("must be 4 or 8", key="tuning.bits", value=self.bits, remedy="Give one of them")
        require_above(self, "tuning.", alpha=0, loraplus_lr_ratio=0)
        if self.bits == 8 and self.method is not TuningMethod.qlora:
            raise UserError(
                f"only tuning=qlora has a quantised base, this is {self.method.name}",
                key="tuning.bits",
                value="8",
                remedy="Leave it out",
            )
        adapter_defaults = {"use_rslora": False, "use_dora": False, "experts": False, "loraplus_lr_ratio": 1.0}
        for name, default in adapter_defaults.items():
            if getattr(self, name) != default and not self.has_adapters:
                raise UserError(
                    f"tuning={self.method.name} has no adapters",
                    key=f"tuning.{name}",
                    value=getattr(self, name),
                    remedy="Use tuning=lora or qlora",
                )
        self._check_experts()
        if self.trainable and self.method is not TuningMethod.freeze:
            raise UserError(
                f"only tuning=freeze reads it, this is {self.method.name}",
                key="tuning.trainable",
                value=list(self.trainable),
                remedy="Use tuning=freeze, or leave it out",
            )

    def _check_experts(self) -> None:
        """Raises `UserError` for what the adapters of experts, which are added to the weights, cannot compute."""
        if not self.experts:
            return
        if self.dropout:
            raise UserError(
                "adapters of experts are added to the weights, so there is no input of theirs to drop; PEFT has one "
                "dropout for all adapters",
                key="tuning.dropout",
                value=self.dropout,
                remedy="Give tuning.dropout=0, or tuning.experts=false",
            )
        if self.use_dora:
            raise UserError(
                "PEFT has no DoRA for experts",
                key="tuning.use_dora",
                value="true",
                remedy="Give tuning.use_dora=false, or tuning.experts=false",
            )

    @property
    def has_adapters(self) -> bool:
        """True where the method trains adapters."""
        return self.method in (TuningMethod.lora, TuningMethod.qlora)
