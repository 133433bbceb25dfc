"""A tokenizer as a base to merge pieces into, whichever of the two ways it is kept."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from fireflyds.errors import UserError
from fireflyds.tokenizer.bpe import Bpe, Step
from fireflyds.tokenizer.encoder import model_file
from fireflyds.tokenizer.json_base import JsonBase
from fireflyds.tokenizer.sentencepiece_base import SentencePieceBase
from fireflyds.types import Encoder


class Base(Protocol):
    """What a merge needs to know of a tokenizer, and what it does to it."""

    num_tokens: int
    """Ids in use, added tokens included: the id of the first new piece."""
    has_fragments: bool
    """Pieces are bytes, so that a new one may be a part of a character."""

    disagreement: str | None
    """Why `AutoTokenizer` cannot give the same ids for every text, where it cannot."""

    def bpe(self) -> Bpe: ...

    def spelled(self, text: str) -> str:
        """A text as pieces spell it: `▁` or `Ġ` for a space."""

    def text(self, piece: str) -> str | None:
        """The text of a piece; None for a part of a character."""

    def as_bytes(self, piece: str) -> bytes:
        """The UTF-8 of a piece, which may be a part of a character."""

    def knows(self, piece: str) -> bool: ...

    def old_ids(self, piece: str) -> list[int]:
        """The base's ids of a piece's text alone: without BOS and without the dummy prefix."""

    def encoder(self, steps: Sequence[Step]) -> Encoder:
        """The base with steps, in memory."""

    def write(self, steps: Sequence[Step], out: Path) -> None:
        """The base with steps, as a directory that `AutoTokenizer` loads."""


def load_base(path: Path, *, tied: bool = False) -> Base:
    """The base at `path`: a `.model`, or a directory with `tokenizer.model` or `tokenizer.json`.

    `tied`: new pieces all get the score 0 and need no way to be reached, as published vocabularies were made.

    Raises:
        UserError: nothing there that is a tokenizer, or one of a kind that cannot be merged into.
    """
    if not path.exists():
        raise UserError(f"base={path}: no such file or directory. Give a Hugging Face directory or a .model file")
    file = model_file(path)
    if file is not None:
        return SentencePieceBase(file, path if path.is_dir() else None, tied=tied)
    if (path / "tokenizer.json").is_file():
        if tied:
            raise UserError(
                f"cure=false: {path} keeps its merges in tokenizer.json, where pieces without merges are never reached. "
                "Leave cure=true"
            )
        return JsonBase(path)
    raise UserError(
        f"base={path}: no tokenizer there to expand (neither tokenizer.model nor tokenizer.json). "
        "Give a directory that has one, or a .model"
    )
