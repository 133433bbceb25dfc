"""Merge pieces into a base: ids of old text stay, and every new piece can be reached."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

from fireflyds.errors import UserError
from fireflyds.tokenizer.base import Base
from fireflyds.tokenizer.bpe import Bpe, Pair, Step
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.types import Encoder

# A longer piece is a line of a corpus, given by mistake.
_LONGEST = 64


@dataclass(slots=True)
class MergePlan:
    """What is appended to a base, in merge order, and what became of the pieces asked for."""

    steps: list[Step] = field(default_factory=list)
    intermediates: list[str] = field(default_factory=list)
    """Pieces of `steps` that nobody asked for, without which others could not be reached."""
    filled: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    """The reason, by piece."""
    present: list[str] = field(default_factory=list)
    """Pieces that the base has already."""

    def keep(self, chosen: set[str], reason: str) -> None:
        """Leave out all steps but the chosen."""
        unasked = {*self.intermediates, *self.filled}
        gone = (step.piece for step in self.steps if step.piece not in chosen and step.piece not in unasked)
        self.dropped |= dict.fromkeys(gone, reason)
        self.steps = [step for step in self.steps if step.piece in chosen]
        self.intermediates = [piece for piece in self.intermediates if piece in chosen]


def plan_merge(base: Base, texts: Sequence[str], scripts: Scripts) -> MergePlan:
    """Steps that reach every piece of `texts` that can be reached, characters first, then in the order given.

    BPE reaches a piece only through parts that are pieces. So every character of a piece is made a piece, and one
    that falls into more than two parts gets the intermediates it lacks, the leftmost first. Merges go behind all
    that stood before them, so none blocks another's path. A piece is dropped when it has no new character, or when
    it could be reached only by a merge that also touches text without new characters.
    """
    inserter, wanted = _Inserter(base, scripts), dict.fromkeys(texts)
    eligible = [text for text in wanted if inserter.is_eligible(text)]
    for character in dict.fromkeys(c for text in eligible for c in text if scripts.covers(c)):
        inserter.insert(character, asked=character in wanted)
    for text in eligible:
        inserter.insert(text, asked=True)
    asked = {base.spelled(text) for text in wanted}
    plan = inserter.plan
    plan.intermediates = [step.piece for step in plan.steps if step.piece not in asked]
    _prune(plan)
    return plan


def _prune(plan: MergePlan) -> None:
    """Leave out intermediates whose piece could not be reached after all."""
    unasked, used = set(plan.intermediates), set[str]()
    for step in reversed(plan.steps):
        if step.piece not in unasked or step.piece in used:
            used |= {step.piece, *(step.parts or ())}
    plan.keep(used, "")


def fill_missing_merges(base: Base, plan: MergePlan, scripts: Scripts, vocab_size: int) -> None:
    """Reach `vocab_size` by further characters of the scripts, which else cost several tokens each, not by dead rows.

    Raises:
        UserError: there are not so many characters.
    """
    inserter = _Inserter(base, scripts, plan)
    for character in scripts.characters():
        missing = vocab_size - base.num_tokens - len(plan.steps)
        if missing <= 0:
            break
        if not inserter.is_known(character) and inserter.cost(character) <= missing:
            before = len(plan.steps)
            inserter.insert(character, asked=False)
            plan.filled += [step.piece for step in plan.steps[before:]]
    missing = vocab_size - base.num_tokens - len(plan.steps)
    if missing > 0:
        raise UserError(
            f"vocab_multiple: {missing:,} more pieces would be needed to reach {vocab_size:,}, and the scripts "
            f"{', '.join(scripts.names)} have no more characters. Give a smaller multiple, or further scripts"
        )


class _Inserter:
    """Adds pieces to a plan, one by one."""

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
        """Whether the piece may be merged; says in the plan why not."""
        piece = self.base.spelled(text)
        if self.base.knows(piece):
            self.plan.present.append(piece)
            return False
        if not self.scripts.has(text):
            self.plan.dropped[piece] = f"no character of {', '.join(self.scripts.names)}"
            return False
        if len(text) > _LONGEST:
            self.plan.dropped[piece] = f"longer than {_LONGEST} characters"
            return False
        strange = [c for c in text if not (self.base.has_fragments or self.scripts.covers(c) or self.is_known(c))]
        if strange:
            self.plan.dropped[piece] = f"{strange[0]!r} is no piece and of none of the scripts"
        return not strange

    def cost(self, text: str) -> int:
        """Rows that the piece needs."""
        return max(1, len(self.bpe.split(self.base.spelled(text))) - 1)

    def insert(self, text: str, *, asked: bool) -> None:
        if self.is_known(text):
            return
        piece = self.base.spelled(text)
        parts = self.bpe.split(piece)
        if len(parts) == 1:  # a character of SentencePiece, which merges nothing
            self._append(Step(piece, None))
            return
        pushed: list[Pair] = []
        while len(parts) > 2:
            pair = next((pair for pair in pairwise(parts) if self._may_join(pair)), None)
            if pair is None:
                self.bpe.pop(len(pushed))
                if asked:
                    self.plan.dropped[piece] = f"reached only by merges that touch other text: {' '.join(parts)}"
                return
            self.bpe.push(pair)
            pushed.append(pair)
            parts = self.bpe.split(piece)
        last = (parts[0], parts[1])
        self.bpe.push(last)
        for pair in [*pushed, last]:
            self._append(Step(pair[0] + pair[1], pair))

    def _append(self, step: Step) -> None:
        self.plan.steps.append(step)
        self._new.add(step.piece)

    def _may_join(self, pair: Pair) -> bool:
        """Whether the joint of two parts is new characters alone, so that no other text is touched (and no token yet)."""
        joint = pair[0] + pair[1]
        if joint in self._new or self.base.knows(joint):
            return False
        text = self.base.text(joint)
        if text is None:
            return self.scripts.covers_lead(self.base.as_bytes(joint))
        return self.scripts.covers(text.removeprefix(" "))


def unreachable(base: Base, plan: MergePlan, encoder: Encoder) -> list[str]:
    """The new pieces that a newline, the piece and a newline do not yield.

    A part of a character is asked for by the characters that begin with it.
    """
    dead = []
    for index, step in enumerate(plan.steps, base.num_tokens):
        text = base.text(step.piece)
        texts = [text] if text is not None else _beginning_with(base.as_bytes(step.piece))
        if not any(index in encoder.encode(f"\n{text}\n") for text in texts):
            dead.append(step.piece)
    return dead


def drop_unreachable(base: Base, plan: MergePlan) -> None:
    """Leave out pieces that text cannot yield although merges lead to them, as where a pre-tokenizer cuts them."""
    while dead := unreachable(base, plan, base.encoder(plan.steps)):
        gone = set()
        for piece in dead:
            users = [step.piece for step in plan.steps if piece in (step.parts or ())]
            # A part of characters that are all pieces: without the last of them it is what that one falls into.
            gone.add(users[-1] if users and base.text(piece) is None else piece)
        for step in plan.steps:
            if gone.intersection(step.parts or ()):
                gone.add(step.piece)
        used = {part for step in plan.steps if step.piece not in gone for part in step.parts or ()}
        gone |= set(plan.intermediates) - used
        plan.keep({step.piece for step in plan.steps} - gone, "no text yields it: the base cuts text inside it")


def _beginning_with(lead: bytes) -> Iterator[str]:
    tails = [bytes([byte]) for byte in range(0x80, 0xC0)]
    for tail in tails + [first + second for first in tails for second in tails]:
        text = (lead + tail).decode("utf-8", "ignore")
        if text and text.encode() == lead + tail:
            yield text
