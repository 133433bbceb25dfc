"""Optimizers: one file is one entry, and exports `OPTIMIZER`. `optim.name` is the name of the file."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from fireflyds import registry
from fireflyds.config import TrainConfig

PACKAGE = "fireflyds.optim.optimizers"
# bitsandbytes passes the number of elements to its kernels as an int32, which wraps (its backends/cuda/ops.py).
BITSANDBYTES_MAX_ELEMENTS = 2**31 - 1


@dataclass(slots=True)
class ParamGroup:
    """Parameters that share a peak learning rate `lr` and a weight decay; all groups follow one schedule.

    `as_matrices`: the optimizer treats them as matrices (Muon's orthogonalised update).
    """

    name: str
    lr: float
    weight_decay: float
    as_matrices: bool = False
    parameters: list[nn.Parameter] = field(default_factory=list)

    @property
    def num_parameters(self) -> int:
        """Number of weights in the group."""
        return sum(parameter.numel() for parameter in self.parameters)

    def settings(self) -> dict[str, Any]:
        """The group as torch's optimizers take it; it keeps its peak as `initial_lr`."""
        return {"params": self.parameters, "lr": self.lr, "initial_lr": self.lr, "weight_decay": self.weight_decay}


def _no_check(config: TrainConfig) -> list[str]:
    return []


@dataclass(frozen=True, slots=True)
class OptimizerSpec:
    """All that the rest of the code must know of an optimizer."""

    build: Callable[[Sequence[ParamGroup], TrainConfig], torch.optim.Optimizer]
    state_bytes: int
    """Bytes of state for one parameter."""
    matrix_state_bytes: int | None = None
    """The same for the body's matrices, where the optimizer treats them apart; None: it does not."""
    check: Callable[[TrainConfig], list[str]] = _no_check
    """Raises `UserError` for what it cannot be combined with; returns notes for the log."""
    clips: bool = True
    """False where gradients must not be clipped to `optim.max_grad_norm`."""
    zero_optimization: dict[str, Any] = field(default_factory=dict)
    """What DeepSpeed's `zero_optimization` must say because of it."""
    is_adam: bool = False
    """Whether a DeepSpeed JSON of another project may call it Adam or AdamW."""
    compiles: bool = False
    """Its step loads torch's compiler."""
    max_elements: int | None = None
    """Elements that one tensor may have; None: any number."""
    cpu_step_copies: int = 0
    """float32 copies of a parameter that its step holds on a CPU, one parameter at a time."""

    @property
    def treats_matrices_apart(self) -> bool:
        """True where matrices have another optimizer state than the other weights."""
        return self.matrix_state_bytes is not None

    def state_bytes_of(self, group: ParamGroup) -> int:
        """Bytes of state for one parameter of a group."""
        return self.matrix_state_bytes if group.as_matrices and self.matrix_state_bytes else self.state_bytes


def load_optimizer_spec(name: str) -> OptimizerSpec:
    """The entry of that name.

    Raises:
        UserError: there is none.
    """
    spec: OptimizerSpec = registry.find(PACKAGE, name, "optim.name").OPTIMIZER
    return spec


def build_optimizer(groups: Sequence[ParamGroup], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer of a run over its parameter groups.

    Raises:
        UserError: it cannot be built here.
    """
    return load_optimizer_spec(config.optim.name).build(groups, config)


def gradient_clipping(config: TrainConfig) -> float:
    """The norm that DeepSpeed clips to, 0 for none. Always given: without the key DeepSpeed takes 1."""
    return config.optim.max_grad_norm if load_optimizer_spec(config.optim.name).clips else 0.0


def reset_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Count steps from 0 again. Moments stay: after a step with zero gradients they are zero."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0
