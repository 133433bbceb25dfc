"""Options of the optimizer, the learning rate schedule and the parameter groups."""

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from fireflyds import registry
from fireflyds.config.enums import Schedule, require_above
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class GroupConfig:
    """Sections `optim.embeddings`, `head`, `norms` and `biases`: settings of one parameter group."""

    lr: float | None = None
    """Peak learning rate of this group; unset: `optim.lr`."""
    weight_decay: float | None = None
    """Weight decay of this group; unset: `optim.weight_decay` for matrices, 0 for norms and biases."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
    """Section `optim`: the optimizer, the length of the run and the learning rate schedule."""

    name: str = MISSING
    """Entry of `fireflyds/optim/optimizers`: `adamw` (fused on a GPU; DeepSpeed's CPU Adam where
    `zero.offload_optimizer` is on), `paged_adamw_32bit`, `adamw_8bit` (both bitsandbytes) or `muon` (Muon for hidden
    weight matrices, AdamW for the other parameters)."""
    steps: int | None = None
    """Number of optimizer steps. Takes precedence over `epochs`."""
    epochs: float | None = None
    """Passes over the data, used where `steps` is not set."""
    lr: float = MISSING
    """Peak learning rate."""
    muon_lr: float = 0.02
    """Peak learning rate of the matrices that Muon updates; `lr` is AdamW's. From ZeRO stage 1 on, `grad_norm` is the
    norm of the update."""
    schedule: Schedule = Schedule.cosine
    """`cosine`, `linear` and `polynomial` decay to `min_lr_ratio`, `wsd` is constant and decays at the end
    (`decay_ratio`), `constant` and `constant_with_warmup` do not decay."""
    warmup_steps: int | None = None
    """Steps of linear warm-up. Takes precedence over `warmup_ratio`."""
    warmup_ratio: float = 0.0
    """Fraction of the steps used for warm-up."""
    min_lr_ratio: float = 0.1
    """Final learning rate of the decay, as a fraction of `lr`."""
    power: float = 2.0
    """Exponent of the polynomial decay."""
    decay_ratio: float = 0.1
    """Fraction of the steps in which `wsd` decays."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    """Beta coefficients of AdamW."""
    eps: float = 1e-8
    """Epsilon of AdamW."""
    weight_decay: float = 0.0
    """Decoupled weight decay, on matrices only."""
    max_grad_norm: float = 1.0
    """Maximum global gradient norm (clipping); 0: no clipping."""
    embeddings: GroupConfig = field(default_factory=GroupConfig)
    head: GroupConfig = field(default_factory=GroupConfig)
    norms: GroupConfig = field(default_factory=GroupConfig)
    biases: GroupConfig = field(default_factory=GroupConfig)
    neftune_noise_alpha: float = 0.0
    """NEFTune (arXiv 2310.05914): alpha of the uniform noise alpha / sqrt(tokens x width) on the embeddings of each
    document; 5 to 15 in the paper; 0: no noise."""

    def __post_init__(self) -> None:
        registry.require("fireflyds.optim.optimizers", self.name, "optim.name")
        if self.steps is None and self.epochs is None:
            raise UserError(
                "is unset and so is optim.epochs, so the run has no length",
                key="optim.steps",
                remedy="Give one of them, e.g. optim.steps=1000",
            )
        require_above(self, "optim.", steps=0, epochs=0, lr=0, muon_lr=0, power=0, eps=0)
        for name in ("warmup_ratio", "min_lr_ratio", "decay_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(
                    "must be in [0, 1]",
                    key=f"optim.{name}",
                    value=getattr(self, name),
                    remedy="Give a share, such as 0.1",
                )
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                "two numbers in [0, 1) are needed",
                key="optim.betas",
                value=list(self.betas),
                remedy="Give some, such as [0.9, 0.95]",
            )
        not_negative = {
            name: getattr(self, name)
            for name in ("neftune_noise_alpha", "max_grad_norm", "weight_decay", "warmup_steps")
        }
        for group in ("embeddings", "head", "norms", "biases"):
            group_config = getattr(self, group)
            not_negative |= {f"{group}.lr": group_config.lr, f"{group}.weight_decay": group_config.weight_decay}
        for name, value in not_negative.items():
            if value is not None and not 0 <= value < math.inf:
                raise UserError(
                    "must be a number of at least 0", key=f"optim.{name}", value=value, remedy="Give 0 or more"
                )
