"""Options of the optimizer, the learning rate schedule and the parameter groups."""

import math
from dataclasses import dataclass, field

from omegaconf import MISSING

from fireflyds.config.enums import Schedule
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class GroupConfig:
    lr: float | None = None
    """Peak learning rate of this group; unset: `optim.lr`."""
    weight_decay: float | None = None
    """Weight decay of this group; unset: `optim.weight_decay` for matrices, 0 for norms and biases."""


@dataclass(kw_only=True, slots=True)
class OptimConfig:
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
        if self.steps is None and self.epochs is None:
            raise UserError(
                "optim.steps and optim.epochs are both unset: set the length of the run, e.g. optim.steps=1000"
            )
        for name in ("steps", "epochs", "lr", "muon_lr", "power", "eps"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise UserError("must be greater than 0", key=f"optim.{name}", value=value)
        for name in ("warmup_ratio", "min_lr_ratio", "decay_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError("must be in [0, 1]", key=f"optim.{name}", value=getattr(self, name))
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise UserError(
                "two numbers in [0, 1) are needed, such as [0.9, 0.95]", key="optim.betas", value=list(self.betas)
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
                raise UserError("must be a number of at least 0", key=f"optim.{name}", value=value)
