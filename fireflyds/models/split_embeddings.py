"""Embeddings and head whose new rows train while the old ones stay: two parameters a matrix.

A mask over the gradient of one matrix would leave gradients, optimizer states, shards and checkpoints as large as if all
rows trained; a parameter of the new rows alone makes them as small as what is learnt. Weights are written as one matrix.
"""

from typing import Any

import torch
from fireflyds_kernels import linear_cross_entropy
from torch import Tensor, nn
from torch.nn.functional import embedding, linear

from fireflyds.config import TrainableRows, TuningConfig
from fireflyds.errors import UserError


class SplitEmbedding(nn.Module):
    """`old` `[first, d]`, frozen, and `new` `[V - first, d]`, trained."""

    def __init__(self, weight: Tensor, first: int) -> None:
        super().__init__()
        self.first = first
        self.frozen = nn.Parameter(weight[:first].detach().clone(), requires_grad=False)
        self.trainable = nn.Parameter(weight[first:].detach().float())

    def forward(self, input_ids: Tensor) -> Tensor:
        """`[...]` ids to `[..., d]`, in the number format of the old rows."""
        old = embedding(input_ids.clamp(max=self.first - 1), self.frozen)
        new = embedding((input_ids - self.first).clamp(min=0), self.trainable).to(old.dtype)
        return torch.where((input_ids >= self.first)[..., None], new, old)


class FusedLossHead(nn.Linear):
    """A model's own head, which also gives the loss. Called as a module, so that ZeRO-3 gathers its weight."""

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, reduction: str = "sum", num_labels: int | None = None
    ) -> Any:
        """Logits `[..., V]`, or with labels the loss (see `linear_cross_entropy`)."""
        if labels is None:
            return super().forward(hidden)
        return linear_cross_entropy(
            hidden, self.weight, labels, bias=self.bias, reduction=reduction, num_labels=num_labels  # type: ignore[call-overload]
        )  # fmt: skip


class SplitLMHead(nn.Module):
    """A head over the rows of `old` and `new`; of a tied model they are the embeddings' own."""

    def __init__(self, old: nn.Parameter, new: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.first = len(old)
        self.frozen, self.trainable, self.bias = old, new, bias

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, reduction: str = "sum", num_labels: int | None = None
    ) -> Any:
        """Logits `[..., V]`, or with labels the loss."""
        if labels is None:
            return linear(hidden, torch.cat([self.frozen, self.trainable.to(self.frozen.dtype)]), self.bias)
        return linear_cross_entropy(
            hidden, (self.frozen, self.trainable), labels, bias=self.bias, reduction=reduction, num_labels=num_labels  # type: ignore[call-overload]
        )  # fmt: skip


def split_new_rows(model: Any, config: TuningConfig, base_vocab_size: int | None) -> None:
    """Mark the rows of embeddings and head that train; split the matrices that train their new rows alone.

    What trains beside a frozen body is float32: a half-precision tensor could not take a small step.

    Raises:
        UserError: it is not known where the new rows begin, or a tied head is asked to be other than the embeddings.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    if TrainableRows.new_rows in (config.embeddings, config.head) and type(embeddings) is not nn.Embedding:
        raise UserError(
            f"tuning.embeddings=new_rows: the embeddings are a {type(embeddings).__name__}, which cannot be split. Use all"
        )
    if tied and config.embeddings is not config.head:
        raise UserError(
            f"tuning.embeddings={config.embeddings.name}, tuning.head={config.head.name}: the head of this model is its "
            "embeddings (tie_word_embeddings), so both must say the same"
        )
    for name, rows in (("embeddings", config.embeddings), ("head", config.head)):
        if rows is TrainableRows.new_rows:
            check_first_new_row(name, base_vocab_size, len(embeddings.weight))
    for module, rows in ((embeddings, config.embeddings), (head, config.head)):
        module.requires_grad_(rows is TrainableRows.all)
        if rows is TrainableRows.all and config.method.name != "full":
            module.float()
    if config.embeddings is TrainableRows.new_rows:
        embeddings = SplitEmbedding(embeddings.weight, base_vocab_size)  # type: ignore[arg-type]
        model.set_input_embeddings(embeddings)
    if config.head is TrainableRows.new_rows:
        matrix = embeddings if tied else SplitEmbedding(head.weight, base_vocab_size)  # type: ignore[arg-type]
        model.set_output_embeddings(SplitLMHead(matrix.frozen, matrix.trainable, head.bias))


def check_first_new_row(name: str, first: int | None, rows: int) -> None:
    """Raises `UserError` unless new rows begin within the matrix."""
    if first is None:
        raise UserError(
            f"tuning.{name}=new_rows: the model does not say where its new rows begin. Expand it with launch/expand.py, or "
            "give model.base_vocab_size=<rows before the expansion>"
        )
    if not 0 < first < rows:
        raise UserError(
            f"tuning.{name}=new_rows: model.base_vocab_size={first}, but the model has {rows} rows; there must be rows "
            f"before and behind. Use tuning.{name}=all for a model that was not expanded"
        )
