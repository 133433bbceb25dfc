"""What a run minimises: one file is one entry, and exports `OBJECTIVE`.

An objective says what a batch must hold and what its loss is normalised by, and turns the last hidden states into the loss.
"""

from typing import Protocol

from torch import Tensor, nn

from fireflyds import registry
from fireflyds.config import ObjectiveConfig
from fireflyds.models.packed.head import HeadInputs
from fireflyds.types import PackedBatch

PACKAGE = "fireflyds.train.objectives"


ObjectiveLoss = tuple[Tensor, Tensor]
"""Of one micro-batch: the loss sum, a scalar that is not yet normalised; and without gradient what each position adds to it
`[T]`, for the figures of every domain. A plain tuple, in which DeepSpeed finds the tensors."""


class Objective(Protocol):
    """`requires`: the fields of `PackedBatch` that it reads beside `input_ids` and the boundaries."""

    requires: tuple[str, ...]

    def count(self, batch: PackedBatch) -> int:
        """What the loss sum of a whole optimizer step is divided by, of one micro-batch: learned tokens, or pairs."""

    def __call__(self, head: nn.Module, hidden: Tensor, inputs: HeadInputs) -> ObjectiveLoss:
        """The loss from the last hidden states `[T, d]`. It goes through the head module, whose weight ZeRO-3 gathers."""


def load_objective(config: ObjectiveConfig) -> Objective:
    """The objective that the configuration names.

    Raises:
        UserError: there is none of that name.
    """
    objective: Objective = registry.find(PACKAGE, config.name).OBJECTIVE
    return objective
