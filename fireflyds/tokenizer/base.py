"""Base tokenizers, which new pieces are merged into: SentencePiece models and `tokenizer.json` files."""

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
    """Interface of a base tokenizer, as used for planning and writing a merge."""

    num_tokens: int
    """Number of ids in use, including added tokens; equals the id of the first new piece."""
    has_fragments: bool
    """True where pieces are byte sequences (byte-level BPE), so that a new piece may be an incomplete character."""

    num_added_bytes: int
    """Number of byte pieces that the base lacks and `add_bytes` adds: the last ids below `num_tokens`."""

    disagreement: str | None
    """The reason why `AutoTokenizer` cannot return the same ids for every text; None where it can."""

    def bpe(self) -> Bpe:
        """Returns a copy of the base's merges, for planning."""

    def original_encoder(self) -> Encoder:
        """Returns an encoder of the base as it is, also where its pre-tokenizer is changed."""

    def num_cut_words(self, words: list[str]) -> int:
        """Returns how many of the words with combining marks the base's pre-tokenizer cuts; no piece crosses a cut."""

    def spelled(self, text: str) -> str:
        """Converts text to the spelling of pieces, with `▁` or `Ġ` for a space."""

    def text(self, piece: str) -> str | None:
        """Returns the text of a piece; None where its bytes are an incomplete character."""

    def as_bytes(self, piece: str) -> bytes:
        """Returns the UTF-8 bytes of a piece, which may be an incomplete character."""

    def knows(self, piece: str) -> bool:
        """True where the piece is in the base's vocabulary."""

    def old_ids(self, piece: str) -> list[int]:
        """Returns the base's ids of the text of a piece, without BOS and without the dummy prefix."""

    def encoder(self, steps: Sequence[Step]) -> Encoder:
        """Returns an in-memory encoder of the base with the steps appended."""

    def write(self, steps: Sequence[Step], out: Path) -> None:
        """Writes the base with the steps appended, as a directory that `AutoTokenizer` loads."""


def load_base(path: Path, *, tied: bool = False, add_bytes: bool = False, marks: bool = False) -> Base:
    """Loads the base tokenizer at `path`.

    Args:
        path: a SentencePiece `.model` file, or a directory with `tokenizer.model` or `tokenizer.json`.
        marks: combining marks are parts of words.
        add_bytes: a base without byte pieces gets them.
        tied: all new pieces get the score 0 and may be unreachable, as in published vocabularies.

    Raises:
        UserError: there is no tokenizer at `path`, or pieces cannot be merged into a tokenizer of its type.
    """
    if not path.exists():
        raise UserError(
            "no such file or directory", key="base", value=path, remedy="Give a Hugging Face directory or a .model file"
        )
    file = model_file(path)
    if file is not None:
        if marks:
            raise UserError(
                "SentencePiece cuts no words at combining marks",
                key="pretokenizer",
                value="marks",
                remedy="Leave it out",
            )
        return SentencePieceBase(file, path if path.is_dir() else None, tied=tied, add_bytes=add_bytes)
    if (path / "tokenizer.json").is_file():
        if tied:
            raise UserError(
                f"{path} stores its merges in tokenizer.json, where pieces without merges are unreachable",
                key="cure",
                value="false",
                remedy="Use cure=true",
            )
        return JsonBase(path, marks=marks)
    raise UserError(
        "no tokenizer found (neither tokenizer.model nor tokenizer.json)",
        key="base",
        value=path,
        remedy="Give a directory that has one (transformers writes tokenizer.json: "
        "AutoTokenizer.from_pretrained(…).save_pretrained(…)), or a .model file",
    )
