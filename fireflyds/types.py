"""The values handed from step to step. Nothing here knows how they are made."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

IGNORE_INDEX = -100

# Stand for the tokenizer's own begin and end tokens in a chat template's segments.
BOS = "<|fireflyds:bos|>"
EOS = "<|fireflyds:eos|>"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn: `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Sample:
    """One record in words: either a document (`text`) or a dialogue (`messages`)."""

    text: str | None = None
    messages: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a rendered dialogue. `special` text is one token, never split; `learn` text carries loss."""

    text: str
    learn: bool = False
    special: bool = False


@dataclass(frozen=True, slots=True)
class Example:
    """One record in tokens.

    `spans` are the `[start, end)` token ranges that carry loss, in order; `num_bytes` is the UTF-8 length of
    the text, the denominator of bits per byte.
    """

    input_ids: np.ndarray
    spans: tuple[tuple[int, int], ...]
    num_bytes: int
    is_document: bool = False
    """Plain text: loss on everything, and it may be cut anywhere."""


class Encoder(Protocol):
    """A tokenizer reduced to what data and evaluation need."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    """Documents begin with BOS: what the tokenizer does by itself."""

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of plain text, no special tokens. `continues`: the text goes on from other text (no dummy prefix)."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """The same as `encode` of each, in less time."""

    def token_id(self, token: str) -> int | None:
        """The id of a special token, or None."""

    def decode(self, ids: Sequence[int]) -> str: ...

    def fragments(self) -> frozenset[int]:
        """Ids that spell bytes and no whole character: byte fallback."""

    def token(self, index: int) -> str:
        """What a token spells, for people to read."""

    def token_bytes(self) -> np.ndarray:
        """UTF-8 bytes of text that each token stands for: int32 `[vocab_size]`, 0 for special tokens."""

    def fingerprint(self) -> str:
        """A hash that two tokenizers share when they map the same text to the same ids."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Rows of documents laid end to end, without padding and without a 2-D mask.

    `input_ids`, `labels`, `position_ids`: int64 `[1, T]`; `labels[0, t]` is the target of position t (already
    shifted; -100 where there is none, as at the end of every document). `cu_seqlens`: int32 `[n + 1]`, the
    documents' boundaries; `max_seqlen`: the longest document; `domains`: int64 `[n]`.
    """

    input_ids: Any
    labels: Any
    position_ids: Any
    cu_seqlens: Any
    max_seqlen: int
    domains: Any
    num_learned: int

    @classmethod
    def from_flat(
        cls, input_ids: np.ndarray, labels: np.ndarray, lengths: np.ndarray, domains: np.ndarray | None = None
    ) -> "PackedBatch":
        """The one constructor: ids and labels `[T]` of documents of these lengths `[n]`, laid end to end."""
        import torch  # types are imported where torch is not

        bounds = np.concatenate([[0], np.cumsum(lengths)])
        positions = np.arange(len(input_ids)) - np.repeat(bounds[:-1], lengths)
        domain_of = np.zeros(len(lengths), np.int64) if domains is None else domains.astype(np.int64)
        return cls(
            input_ids=torch.from_numpy(input_ids.astype(np.int64, copy=False))[None],
            labels=torch.from_numpy(labels.astype(np.int64, copy=False))[None],
            position_ids=torch.from_numpy(positions)[None],
            cu_seqlens=torch.from_numpy(bounds.astype(np.int32)),
            max_seqlen=int(lengths.max()),
            domains=torch.from_numpy(domain_of),
            num_learned=int(np.count_nonzero(labels != IGNORE_INDEX)),
        )

    @classmethod
    def from_documents(
        cls, documents: Sequence[Sequence[int]], domains: Sequence[int] | None = None, *, learned: bool = True
    ) -> "PackedBatch":
        """Documents given by their ids. Every token after a document's first is a target, or with `learned=False` none."""
        lengths = np.array([len(ids) for ids in documents])
        flat = np.concatenate([np.asarray(ids, np.int64) for ids in documents])
        labels = next_token_labels(flat, np.cumsum(lengths)) if learned else np.full_like(flat, IGNORE_INDEX)
        return cls.from_flat(flat, labels, lengths, None if domains is None else np.asarray(domains))

    def pin(self) -> "PackedBatch":
        """In page-locked host memory, from which a copy to the GPU does not hold up the host."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _MODEL_TENSORS})

    def model_inputs(self, device: Any) -> dict[str, Any]:
        """The keyword arguments of the packed forward pass, on `device`."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _MODEL_TENSORS}
        return moved | {"max_seqlen": self.max_seqlen, "num_labels": self.num_learned}


_MODEL_TENSORS = ("input_ids", "labels", "position_ids", "cu_seqlens")


def next_token_labels(input_ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Position t is to predict token t + 1; the last of a document, before each of `ends` `[n]`, predicts nothing."""
    labels = np.empty_like(input_ids)
    labels[:-1] = input_ids[1:]
    labels[ends - 1] = IGNORE_INDEX
    return labels


@dataclass(frozen=True, slots=True)
class Family:
    """What differs between model families: the names of things.

    `fused` maps the classes of its modules to the functions of `models/fused.py` that compute the same with our kernels.
    """

    model_type: str
    linear_layers: tuple[str, ...]
    fused: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model on its device, with its family."""

    model: Any
    family: Family


@dataclass(slots=True)
class TrainState:
    """Where a run stands. Position in the data is arithmetic: step s reads the batch of step `s + skipped_batches`."""

    step: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    skipped_batches: int = 0
    """Steps of data that were left out after spikes of the loss."""
    rollbacks: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """Of the last steps, by which a spike is known."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """One optimizer step, over all ranks and micro-batches. One line of `metrics.jsonl`."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    learned_tokens: int
    tokens_per_second: float
    seconds: float
    extra: dict[str, float] = field(default_factory=dict)

    def as_dict(self) -> dict[str, float]:
        row = asdict(self)
        extra: dict[str, float] = row.pop("extra")
        return row | extra
