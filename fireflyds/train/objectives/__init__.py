"""Training objectives: every module is one objective and exports `OBJECTIVE`.

An objective declares the batch fields that it requires, counts the loss denominator, and computes the loss from the
last hidden states.
"""

import dataclasses
from typing import Protocol

from torch import Tensor, nn

from fireflyds import registry
from fireflyds.config import ObjectiveConfig
from fireflyds.errors import UserError
from fireflyds.models.packed.head import HeadInputs
from fireflyds.types import PackedBatch

PACKAGE = "fireflyds.train.objectives"

ObjectiveLoss = tuple[Tensor, Tensor]
"""Result for one micro-batch: the loss sum, a scalar that is not yet normalized; and the contribution of every position
to it `[T]`, without gradient, for metrics by domain. A plain tuple, in which DeepSpeed finds the tensors."""


class Objective(Protocol):
    """`requires`: the fields of `PackedBatch` that it reads in addition to `input_ids` and the document boundaries."""

    requires: tuple[str, ...]

    def count(self, batch: PackedBatch) -> int:
        """Contribution of a micro-batch to the loss denominator of the step: number of learned tokens, or of pairs."""

    def __call__(self, head: nn.Module, hidden: Tensor, inputs: HeadInputs) -> ObjectiveLoss:
        """Computes the loss from the last hidden states `[T, d]`. Calls `head`, so that ZeRO-3 gathers its weight."""


def load_objective(config: ObjectiveConfig) -> Objective:
    """Returns the objective named in the config.

    Raises:
        UserError: there is no objective of that name, or it requires fields that a batch does not have.
    """
    objective: Objective = registry.find(PACKAGE, config.name, "objective.name").OBJECTIVE
    if missing := set(objective.requires) - {field.name for field in dataclasses.fields(PackedBatch)}:
        raise UserError(
            f"requires {', '.join(sorted(missing))}, which a batch does not have",
            key="objective.name",
            value=config.name,
            remedy="Give another objective, or add these fields to PackedBatch",
        )
    return objective
