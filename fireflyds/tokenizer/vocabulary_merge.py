"""Merges pieces into a base tokenizer: ids of old text are unchanged, and every new piece is reachable."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fireflyds.errors import UserError
from fireflyds.tokenizer.base import Base
from fireflyds.tokenizer.bpe import Bpe, Pair, Step
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.types import Encoder

# Maximum piece length in characters; longer ones are most likely corpus lines, given by mistake.
_MAX_PIECE_LENGTH = 64


@dataclass(slots=True)
class MergePlan:
    """The steps to append to a base, in merge order, and the outcome for each requested piece."""

    steps: list[Step] = field(default_factory=list)
    intermediates: list[str] = field(default_factory=list)
    """Pieces of `steps` that were not requested but are needed to reach others."""
    filled: list[str] = field(default_factory=list)
    """Characters added to reach the vocabulary size."""
    dropped: dict[str, str] = field(default_factory=dict)
    """Pieces that are not added, with the reason."""
    present: list[str] = field(default_factory=list)
    """Requested pieces that are already in the base."""

    def keep(self, chosen: set[str], reason: str) -> None:
        """Removes all steps except those of `chosen`; requested pieces among them are added to `dropped`."""
        not_requested = {*self.intermediates, *self.filled}
        removed = (step.piece for step in self.steps if step.piece not in chosen and step.piece not in not_requested)
        self.dropped |= dict.fromkeys(removed, reason)
        self.steps = [step for step in self.steps if step.piece in chosen]
        self.intermediates = [piece for piece in self.intermediates if piece in chosen]


def plan_merge(base: Base, texts: Sequence[str], scripts: Scripts) -> MergePlan:
    """Plans the steps that reach every reachable piece of `texts`: characters first, then in the given order.

    BPE reaches a piece only through parts that are pieces. Therefore every character of a piece becomes a piece, and
    a piece that is encoded as more than two parts gets the missing intermediates, leftmost first. New merges rank
    after all earlier ones, so that no merge blocks another. A piece is dropped where it has no new character, or where
    it is reachable only by a merge that also applies to text without new characters.
    """
    inserter, requested_texts = _Inserter(base, scripts), dict.fromkeys(texts)
    eligible = [text for text in requested_texts if inserter.is_eligible(text)]
    for character in dict.fromkeys(c for text in eligible for c in text if scripts.covers(c)):
        inserter.insert(character, requested=character in requested_texts)
    for text in eligible:
        inserter.insert(text, requested=True)
    requested_pieces = {base.spelled(text) for text in requested_texts}
    plan = inserter.plan
    plan.intermediates = [step.piece for step in plan.steps if step.piece not in requested_pieces]
    _prune(plan)
    return plan


def _prune(plan: MergePlan) -> None:
    """Removes intermediates that no reachable piece uses."""
    not_requested, used = set(plan.intermediates), set[str]()
    for step in reversed(plan.steps):
        if step.piece not in not_requested or step.piece in used:
            used |= {step.piece, *(step.parts or ())}
    plan.keep(used, "")


def fill_missing_merges(base: Base, plan: MergePlan, scripts: Scripts, vocab_size: int) -> None:
    """Fills the plan up to `vocab_size` with characters of the scripts, instead of padding rows that are never used.

    Without a piece of its own, each of these characters takes several tokens.

    Raises:
        UserError: the scripts have too few characters.
    """
    inserter = _Inserter(base, scripts, plan)
    for character in scripts.characters():
        missing = vocab_size - base.num_tokens - len(plan.steps)
        if missing <= 0:
            break
        if not inserter.is_known(character) and inserter.cost(character) <= missing:
            before = len(plan.steps)
            inserter.insert(character, requested=False)
            plan.filled += [step.piece for step in plan.steps[before:]]
    missing = vocab_size - base.num_tokens - len(plan.steps)
    if missing > 0:
        raise UserError(
            f"{missing:,} more pieces would be needed to reach {vocab_size:,}, and the scripts "
            f"{', '.join(scripts.names)} have no more characters",
            key="vocab_multiple",
            remedy="Give a smaller multiple, or more scripts",
        )


class _Inserter:
    """Adds pieces and the merges they need to a plan."""

    def __init__(self, base: Base, scripts: Scripts, plan: MergePlan | None = None) -> None:
        self.base = base
        self.scripts = scripts
        self.plan = plan or MergePlan()
        self.bpe: Bpe = base.bpe()
        self._new = {step.piece for step in self.plan.steps}
        for step in self.plan.steps:
            if step.parts:
                self.bpe.push(step.parts)

    def is_known(self, text: str) -> bool:
        piece = self.base.spelled(text)
        return piece in self._new or self.base.knows(piece)

    def is_eligible(self, text: str) -> bool:
        """True where the piece may be merged; otherwise records it in the plan as present or dropped."""
        piece = self.base.spelled(text)
        if self.base.knows(piece):
            self.plan.present.append(piece)
            return False
        if not self.scripts.has(text):
            self.plan.dropped[piece] = f"no character of {', '.join(self.scripts.names)}"
            return False
        if len(text) > _MAX_PIECE_LENGTH:
            self.plan.dropped[piece] = f"longer than {_MAX_PIECE_LENGTH} characters"
            return False
        foreign = [c for c in text if not (self.base.has_fragments or self.scripts.covers(c) or self.is_known(c))]
        if foreign:
            self.plan.dropped[piece] = f"{foreign[0]!r} is not a piece of the base and not in the scripts"
        return not foreign

    def cost(self, text: str) -> int:
        """Returns the number of rows that the piece needs, including its intermediates."""
        return max(1, len(self.bpe.split(self.base.spelled(text))) - 1)

    def insert(self, text: str, *, requested: bool) -> None:
        """Appends the piece and its intermediates; a `requested` one that is unreachable is recorded as dropped."""
        if self.is_known(text):
            return
        piece = self.base.spelled(text)
        parts = self.bpe.split(piece)
        if len(parts) == 1:  # a single character in SentencePiece needs no merge
            self._append(Step(piece, None))
            return
        pushed: list[Pair] = []
        while len(parts) > 2:
            pair = next((pair for pair in pairwise(parts) if self._is_safe_merge(pair)), None)
            if pair is None:
                self.bpe.pop(len(pushed))
                if requested:
                    self.plan.dropped[piece] = f"reached only by merges that touch other text: {' '.join(parts)}"
                return
            self.bpe.push(pair)
            pushed.append(pair)
            parts = self.bpe.split(piece)
        final_pair = (parts[0], parts[1])
        self.bpe.push(final_pair)
        for pair in [*pushed, final_pair]:
            self._append(Step(pair[0] + pair[1], pair))

    def _append(self, step: Step) -> None:
        self.plan.steps.append(step)
        self._new.add(step.piece)

    def _is_safe_merge(self, pair: Pair) -> bool:
        """True where the merged pair is not a piece and has only new characters, so that other text is unaffected."""
        merged = pair[0] + pair[1]
        if merged in self._new or self.base.knows(merged):
            return False
        text = self.base.text(merged)
        if text is None:
            return self.scripts.covers_lead(self.base.as_bytes(merged))
        return self.scripts.covers(text.removeprefix(" "))


def unreachable(base: Base, plan: MergePlan, encoder: Encoder) -> list[str]:
    """Returns the new pieces that do not occur in the encoding of a newline, the piece and a newline.

    Incomplete characters are tested with the characters whose UTF-8 begins with them.
    """
    dead_pieces = []
    for index, step in enumerate(plan.steps, base.num_tokens):
        text = base.text(step.piece)
        texts = [text] if text is not None else _characters_with_prefix(base.as_bytes(step.piece))
        if not any(index in encoder.encode(f"\n{text}\n") for text in texts):
            dead_pieces.append(step.piece)
    return dead_pieces


def drop_unreachable(base: Base, plan: MergePlan) -> None:
    """Removes pieces that no text is encoded to in spite of their merges, e.g. where the pre-tokenizer splits them."""
    while dead_pieces := unreachable(base, plan, base.encoder(plan.steps)):
        removed = set()
        for piece in dead_pieces:
            users = [step.piece for step in plan.steps if piece in (step.parts or ())]
            # All characters with this prefix are pieces; without the last of them, the prefix itself becomes reachable.
            removed.add(users[-1] if users and base.text(piece) is None else piece)
        for step in plan.steps:
            if removed.intersection(step.parts or ()):
                removed.add(step.piece)
        used = {part for step in plan.steps if step.piece not in removed for part in step.parts or ()}
        removed |= set(plan.intermediates) - used
        plan.keep({step.piece for step in plan.steps} - removed, "unreachable: the base splits text inside it")


def _characters_with_prefix(lead: bytes) -> Iterator[str]:
    tails = [bytes([byte]) for byte in range(0x80, 0xC0)]
    for tail in tails + [first + second for first in tails for second in tails]:
        text = (lead + tail).decode("utf-8", "ignore")
        if text and text.encode() == lead + tail:
            yield text
