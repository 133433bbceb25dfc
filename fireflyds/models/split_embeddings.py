"""Embeddings and head whose new rows are trainable while the base rows are frozen: two parameters per matrix.

With a gradient mask over one matrix, gradients, optimizer states, shards and checkpoints would have the size of all
rows; with a separate parameter they have the size of the new rows. The export writes one matrix.
"""

from typing import Any

import torch
from fireflyds_kernels import linear_cross_entropy
from torch import Tensor, nn
from torch.nn.functional import embedding, linear, normalize

from fireflyds.config import TrainableRows, TuningConfig
from fireflyds.errors import UserError
from fireflyds.models.baichuan import NormHead
from fireflyds.models.deferred import rows_of


class SplitEmbedding(nn.Module):
    """Embedding of V rows in two parameters: `frozen` `[first, d]`, and `trainable` `[V - first, d]` in float32.

    `scale`: a factor of the embeddings, as Gemma's; None for none.
    """

    scale: Tensor | None

    def __init__(self, weight: Tensor, first: int, scale: float | None = None) -> None:
        super().__init__()
        self.first = first
        self.register_buffer("scale", None if scale is None else torch.tensor(scale), persistent=False)
        self.frozen = rows_of(weight, slice(first))
        self.trainable = rows_of(weight, slice(first, None))
        self.trainable.data = self.trainable.data.float()
        self.trainable.requires_grad_(True)

    @property
    def weight(self) -> Tensor:
        """The frozen rows: models ask the weight of their embeddings for its device (Llama 4)."""
        return self.frozen

    def forward(self, input_ids: Tensor) -> Tensor:
        """Returns the embeddings `[..., d]` of ids `[...]`, in the dtype of `frozen`."""
        base_rows = embedding(input_ids.clamp(max=self.first - 1), self.frozen)
        new_rows = embedding((input_ids - self.first).clamp(min=0), self.trainable).to(base_rows.dtype)
        rows = torch.where((input_ids >= self.first)[..., None], new_rows, base_rows)
        return rows if self.scale is None else rows * self.scale.to(rows.dtype)


class _Logits(nn.Module):
    """What models do to their logits behind the head: softcap · tanh(scale · logits / softcap); 0 for no cap.

    `normalized`: the rows of the head are divided by their norms (Baichuan 2).
    """

    scale: float = 1.0
    softcap: float = 0.0
    normalized: bool = False

    def _scaled(self, hidden: Tensor) -> Tensor:
        """`hidden` times the scale: a head without a bias is linear, so its logits are scaled exactly."""
        return hidden if self.scale == 1 else hidden * self.scale

    def _rows(self, weight: Tensor) -> Tensor:
        return normalize(weight) if self.normalized else weight

    def _capped(self, logits: Tensor) -> Tensor:
        return torch.tanh(logits / self.softcap) * self.softcap if self.softcap else logits


class FusedLossHead(nn.Linear, _Logits):
    """Linear head that also computes the loss. It is called as a module, so that ZeRO-3 gathers its weight."""

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, reduction: str = "sum", num_labels: int | None = None
    ) -> Any:
        """Returns logits `[..., V]`, or with labels the loss (see `linear_cross_entropy`)."""
        hidden = self._scaled(hidden)
        if labels is None:
            return self._capped(linear(hidden, self._rows(self.weight), self.bias))
        return linear_cross_entropy(
            hidden,
            self._rows(self.weight),
            labels,
            bias=self.bias,
            reduction=reduction,
            num_labels=num_labels,  # type: ignore[call-overload]
            softcap=self.softcap,
        )


class SplitLMHead(_Logits):
    """Head over frozen and trainable rows; in a model with tied weights both parameters are those of the embeddings."""

    def __init__(self, frozen: nn.Parameter, trainable: nn.Parameter, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.first = len(frozen)
        self.frozen, self.trainable, self.bias = frozen, trainable, bias

    def forward(
        self, hidden: Tensor, labels: Tensor | None = None, reduction: str = "sum", num_labels: int | None = None
    ) -> Any:
        """Returns logits `[..., V]`, or with labels the loss (see `linear_cross_entropy`)."""
        hidden = self._scaled(hidden)
        if labels is None:
            weight = torch.cat([self.frozen, self.trainable.to(self.frozen.dtype)])
            return self._capped(linear(hidden, self._rows(weight), self.bias))
        return linear_cross_entropy(
            hidden,
            (self._rows(self.frozen), self._rows(self.trainable)),
            labels,
            bias=self.bias,
            reduction=reduction,
            num_labels=num_labels,  # type: ignore[call-overload]
            softcap=self.softcap,
        )


def split_new_rows(model: Any, config: TuningConfig, base_vocab_size: int | None) -> None:
    """Sets which rows of embeddings and head are trainable, and splits the matrices of which only the new rows are.

    Trainable parameters beside a frozen body are float32: small updates would be lost to rounding in half precision.

    Raises:
        UserError: the index of the first new row is unknown or out of range, the embeddings cannot be split, or a tied
            head is configured differently from the embeddings.
    """
    embeddings, head = model.get_input_embeddings(), model.get_output_embeddings()
    tied = head.weight is embeddings.weight
    scale = getattr(embeddings, "scalar_embed_scale", None)
    is_known = type(embeddings) is nn.Embedding or (isinstance(embeddings, nn.Embedding) and scale is not None)
    if TrainableRows.new_rows in (config.embeddings, config.head) and not is_known:
        key = "tuning.embeddings" if config.embeddings is TrainableRows.new_rows else "tuning.head"
        raise UserError(
            f"the embeddings are a {type(embeddings).__name__}, which cannot be split",
            key=key,
            value="new_rows",
            remedy=f"Use {key}=all",
        )
    if tied and config.embeddings is not config.head:
        raise UserError(
            f"tuning.head={config.head.name}, but the head of this model is its embeddings (tie_word_embeddings), so "
            "both must have the same value",
            key="tuning.embeddings",
            value=config.embeddings.name,
            remedy="Give one of the two values for both",
        )
    for name, rows in (("embeddings", config.embeddings), ("head", config.head)):
        if rows is TrainableRows.new_rows:
            check_first_new_row(name, base_vocab_size, len(embeddings.weight))
    for module, rows in ((embeddings, config.embeddings), (head, config.head)):
        module.requires_grad_(rows is TrainableRows.all)
        if rows is TrainableRows.all and config.method.name != "full":
            module.float()
    if config.embeddings is TrainableRows.new_rows:
        embeddings = SplitEmbedding(embeddings.weight, base_vocab_size, scale)  # type: ignore[arg-type]
        model.set_input_embeddings(embeddings)
    if config.head is TrainableRows.new_rows:
        matrix = embeddings if tied else SplitEmbedding(head.weight, base_vocab_size)  # type: ignore[arg-type]
        split = SplitLMHead(matrix.frozen, matrix.trainable, head.bias)
        split.normalized = isinstance(head, NormHead)
        model.set_output_embeddings(split)


def check_first_new_row(name: str, first: int | None, rows: int) -> None:
    """Raises `UserError` unless `first`, the index of the first new row, lies within a matrix of `rows` rows."""
    if first is None:
        raise UserError(
            "the model's config.json has no base_vocab_size",
            key=f"tuning.{name}",
            value="new_rows",
            remedy="Expand it with launch/expand.py, or give model.base_vocab_size=<rows before the expansion>",
        )
    if not 0 < first < rows:
        raise UserError(
            f"model.base_vocab_size={first}, but the model has {rows} rows; it must be at least 1 and less than that",
            key=f"tuning.{name}",
            value="new_rows",
            remedy=f"Use tuning.{name}=all for a model that was not expanded",
        )
