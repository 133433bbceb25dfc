"""Next-token prediction: the sum of the token losses over the global count of learned tokens."""

from torch import Tensor, nn

from fireflyds.models.packed.head import HeadInputs, loss_sum_and_token_losses
from fireflyds.train.objectives import ObjectiveLoss
from fireflyds.types import PackedBatch


class CausalLM:
    """Next-token prediction: the cross-entropy of every labelled token."""

    requires = ("labels",)

    def count(self, batch: PackedBatch) -> int:
        """Number of tokens with a loss in the batch."""
        return batch.num_learned

    def __call__(self, head: nn.Module, hidden: Tensor, inputs: HeadInputs) -> ObjectiveLoss:
        """Returns the sum of the token losses and the losses of single tokens, for hidden states `[T, d]`."""
        return loss_sum_and_token_losses(head, hidden, inputs)


OBJECTIVE = CausalLM()
