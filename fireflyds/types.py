"""Data types shared by the packages of fireflyds. Imports none of these packages."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

import numpy as np

IGNORE_INDEX = -100

# Placeholders for the tokenizer's BOS and EOS tokens in the segments of a chat template.
BOS = "<|fireflyds:bos|>"
EOS = "<|fireflyds:eos|>"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a dialogue: `role` is `system`, `user`, `assistant` or `tool`; `learn`: an answer carries loss.

    `reasoning`: the thoughts before an answer; `tool_calls`: as in OpenAI's API; `tool_call_id`: the call that a
    tool answers.
    """

    role: str
    content: str
    learn: bool = True
    reasoning: str = ""
    tool_calls: tuple[Any, ...] = ()
    tool_call_id: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One text record: either a document (`text`) or a dialogue (`messages`) with the `tools` that it may call."""

    text: str | None = None
    messages: tuple[Message, ...] = ()
    tools: tuple[Any, ...] = ()
    rejected: tuple["Message", ...] = ()
    """The dialogue with the rejected answer, of a preference pair whose chosen answer ends `messages`."""
    label: bool | None = None
    """Whether the answer is a wanted one, where the record says so (KTO)."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A substring of a rendered dialogue. `special`: it is a single token, never split; `learn`: it carries loss;
    `separate`: it is encoded by itself, as an answer is, with loss or without."""

    text: str
    learn: bool = False
    special: bool = False
    separate: bool = False


@dataclass(frozen=True, slots=True)
class TurnPrompt:
    """The tokens before an answer in a dialogue that begins at its turn: the first `head` tokens of the whole dialogue,
    `middle`, and the last `tail` tokens before the answer. All three are empty for the first turn."""

    head: int
    middle: np.ndarray
    tail: int


@dataclass(frozen=True, slots=True)
class Example:
    """One tokenized record.

    `spans` are the `[start, end)` token ranges that carry loss, in order; `num_bytes` is the UTF-8 length of
    the text, the denominator of bits per byte.
    """

    input_ids: np.ndarray
    spans: tuple[tuple[int, int], ...]
    num_bytes: int
    is_document: bool = False
    """True for plain text: all tokens carry loss, and it may be split at any position."""
    prompts: tuple[TurnPrompt, ...] = ()
    """The prompt of every span, with which a dialogue that is longer than a row goes on in the next one."""
    rejected_start: int = 0
    """Of a preference pair: where the tokens of the rejected dialogue begin, behind those of the chosen one; else 0."""
    label: int = -1
    """1 or 0 where the record says whether its answer is wanted, else -1."""
    left_out_thoughts: int = 0
    """Number of earlier answers whose thoughts the chat template leaves out."""


@dataclass(frozen=True, slots=True)
class Strip:
    """White space that a special token removes from the text before it (`left`) and after it (`right`): `lstrip` and
    `rstrip` of transformers."""

    left: bool = False
    right: bool = False


class Encoder(Protocol):
    """The tokenizer interface of data preparation, training and evaluation."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None
    adds_bos: bool
    """True where the tokenizer itself prepends BOS, so that documents begin with BOS."""
    prefix_after_special: bool
    """True where text right after a special token gets the dummy prefix, as text at the beginning does."""

    unknown_id: int | None
    """The id of characters that the vocabulary lacks; None where every text can be encoded (bytes)."""
    chat_template: str | None
    """The Jinja template of the directory; None where it has none."""

    def special_tokens(self) -> tuple[str, ...]:
        """The texts of the special tokens, which no text of a dialogue may spell where they are found in text."""

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Ids of plain text, without special tokens. `continues`: the text follows other text (no dummy prefix)."""

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Encodes several texts; faster than calling `encode` for each, with the same result."""

    def token_id(self, token: str) -> int | None:
        """The id of a special token, or None."""

    def strip_of(self, token: str) -> Strip:
        """The white space that a special token removes from the text beside it."""

    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
        """The text of the ids, without special tokens. `continues`: they follow other text (no dummy prefix)."""

    def fragments(self) -> frozenset[int]:
        """Ids of tokens that decode to bytes of an incomplete character (byte fallback)."""

    def token(self, index: int) -> str:
        """The human-readable text of a token."""

    def token_bytes(self) -> np.ndarray:
        """Number of UTF-8 bytes of text per token: int32 `[vocab_size]`, 0 for special tokens."""

    def fingerprint(self) -> str:
        """A hash that is equal for two tokenizers that map the same text to the same ids."""


@dataclass(frozen=True, slots=True)
class PackedBatch:
    """Packed (concatenated) documents, without padding and without a 2-D mask.

    `input_ids`, `labels`, `position_ids`: int64 `[1, T]`; `labels[0, t]` is the target of position t (already
    shifted; -100 where there is none, as at the end of every document). `cu_seqlens`: int32 `[n + 1]`, the
    document boundaries; `max_seqlen`: length of the longest document; `domains`: int64 `[n]`, domain index of every
    document; `num_learned`: number of labels other than -100.
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
        """Builds a batch from ids and labels `[T]` of concatenated documents with `lengths` `[n]`."""
        import torch  # this module is also imported by code that must not load torch

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
        """Builds a batch from token ids. All but the first of a document are targets; with `learned=False` none is."""
        lengths = np.array([len(ids) for ids in documents])
        flat = np.concatenate([np.asarray(ids, np.int64) for ids in documents])
        labels = next_token_labels(flat, np.cumsum(lengths)) if learned else np.full_like(flat, IGNORE_INDEX)
        return cls.from_flat(flat, labels, lengths, None if domains is None else np.asarray(domains))

    def pin(self) -> "PackedBatch":
        """Returns a copy in page-locked host memory, so that copies to the GPU are asynchronous."""
        return replace(self, **{name: getattr(self, name).pin_memory() for name in _MODEL_TENSORS})

    def model_inputs(self, device: Any) -> dict[str, Any]:
        """The keyword arguments of the packed forward pass, on `device`."""
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in _MODEL_TENSORS}
        return moved | {"max_seqlen": self.max_seqlen, "num_labels": self.num_learned}


_MODEL_TENSORS = ("input_ids", "labels", "position_ids", "cu_seqlens")


def next_token_labels(input_ids: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Labels `[T]`: token t + 1 at position t, -100 at each document end. `ends` `[n]`: exclusive document ends."""
    labels = np.empty_like(input_ids)
    labels[:-1] = input_ids[1:]
    labels[ends - 1] = IGNORE_INDEX
    return labels


@dataclass(frozen=True, slots=True)
class Family:
    """The names of modules and classes that differ between model families.

    `linear_layers`: module names of the linear layers in a block. `fused` maps class names of modules to the functions
    of `models/packed/fused_modules.py` that compute the same with fused kernels.
    """

    model_type: str
    linear_layers: tuple[str, ...]
    fused: Mapping[str, str]
    transposed: bool = False
    """True where its linear layers are `Conv1D`, whose weights are `[inputs, outputs]` (GPT-2)."""


@dataclass(frozen=True, slots=True)
class Loaded:
    """A model on its device, with its family."""

    model: Any
    family: Family


@dataclass(slots=True)
class TrainState:
    """Progress of a run. The data position is computed, not stored: step s reads global batch `s + skipped_batches`."""

    step: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    skipped_batches: int = 0
    """Number of global batches skipped after loss spikes."""
    rollbacks: int = 0
    recent_losses: list[float] = field(default_factory=list)
    """Losses of the last steps, the baseline of spike detection."""

    def as_dict(self) -> dict[str, Any]:
        """Returns the fields by name, as they are stored in a checkpoint."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class StepMetrics:
    """Metrics of one optimizer step, over all ranks and micro-batches: one row of `metrics.jsonl`."""

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
        """Returns the fields by name, with the entries of `extra` among them."""
        row = asdict(self)
        extra: dict[str, float] = row.pop("extra")
        return row | extra
