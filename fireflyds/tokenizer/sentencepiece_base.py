"""Base tokenizers in the SentencePiece BPE format: LLaMA-1/2, Mistral, Baichuan, InternLM and similar."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds.errors import UserError
from fireflyds.tokenizer.bpe import Bpe, Step
from fireflyds.tokenizer.hf_files import write_tokenizer
from fireflyds.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from fireflyds.tokenizer.sentencepiece_model import TIES, check_supported, directory_proto, disagreement
from fireflyds.tokenizer.settings import NAMED, content, settings_of

_PIECE = sp_pb2.ModelProto.SentencePiece
_SPACE = "▁"


class SentencePieceBase:
    """A `tokenizer.model` file. Added tokens of its directory become pieces of the same id, after its own."""

    has_fragments = False

    def __init__(self, file: Path, folder: Path | None, *, tied: bool = False, add_bytes: bool = False) -> None:
        self._tied = tied
        self._proto, remaining = directory_proto(file, folder)
        check_supported(self._proto)
        self._folder = folder
        if folder:
            _refuse_remaining(self._proto, folder, remaining)
            _refuse_unknown_names(self._proto, folder)
        self.num_added_bytes = 0 if self._proto.trainer_spec.byte_fallback else _add_bytes(self._proto, file, add_bytes)
        self.disagreement = TIES if tied else disagreement(self._proto, folder)
        self.num_tokens = len(self._proto.pieces)
        self._pieces = {piece.piece for piece in self._proto.pieces}
        self._encoder = SentencePieceEncoder(self._proto.SerializeToString())

    def bpe(self) -> Bpe:
        """Returns a copy of the base's merges, for planning."""
        ranks = {piece.piece: -piece.score for piece in self._proto.pieces if piece.type == _PIECE.NORMAL}
        return Bpe(ranks, by_text=True)

    def spelled(self, text: str) -> str:
        """Converts text to the spelling of pieces, with `▁` for a space."""
        return text.replace(" ", _SPACE)

    def text(self, piece: str) -> str | None:
        """Returns the text of a piece, with spaces for `▁`."""
        return piece.replace(_SPACE, " ")

    def as_bytes(self, piece: str) -> bytes:
        """Returns the UTF-8 bytes of a piece."""
        return piece.replace(_SPACE, " ").encode()

    def knows(self, piece: str) -> bool:
        """True where the piece is in the base's vocabulary."""
        return piece in self._pieces

    def old_ids(self, piece: str) -> list[int]:
        """Returns the base's ids of the text of a piece, without BOS and without the dummy prefix."""
        return self._encoder.encode(piece.replace(_SPACE, " "), continues=True)

    def encoder(self, steps: Sequence[Step]) -> SentencePieceEncoder:
        """Returns an in-memory encoder of the base with the steps appended."""
        return SentencePieceEncoder(self.merged(steps).SerializeToString())

    def original_encoder(self) -> SentencePieceEncoder:
        """Returns an encoder of the base as it is."""
        return self.encoder([])

    def num_cut_words(self, words: list[str]) -> int:
        """Returns 0: SentencePiece cuts no words at combining marks."""
        return 0

    def write(self, steps: Sequence[Step], out: Path) -> None:
        """Writes the base with the steps appended, and the settings of its directory if it has one."""
        write_tokenizer(self.merged(steps), out, source=self._folder)

    def merged(self, steps: Sequence[Step]) -> sp_pb2.ModelProto:
        """Returns the base with the pieces of the steps appended.

        Their scores decrease in merge order and are below all of the base's (all 0 where tied).
        """
        proto = sp_pb2.ModelProto()
        proto.CopyFrom(self._proto)
        # Pieces of several spaces have the score -1e9 in LLaMA; new pieces need not be below them.
        lowest = min(piece.score for piece in proto.pieces if piece.type == _PIECE.NORMAL and piece.score > -1e8)
        for rank, step in enumerate(steps, 1):
            proto.pieces.add(piece=step.piece, score=0.0 if self._tied else lowest - rank, type=_PIECE.NORMAL)
        proto.trainer_spec.vocab_size = len(proto.pieces)
        return proto


def _refuse_remaining(proto: sp_pb2.ModelProto, folder: Path, remaining: Sequence[dict[str, Any]]) -> None:
    for row in remaining:
        raise UserError(
            f"the added token {row['content']!r} has id {row['id']}, but the next free id after the pieces of "
            f"tokenizer.model is {len(proto.pieces)}",
            key="base",
            value=folder,
            remedy="Use a base whose added tokens follow its pieces",
        )


def _add_bytes(proto: sp_pb2.ModelProto, file: Path, add_bytes: bool) -> int:
    """Adds the pieces of the 256 bytes. Returns their number.

    Raises:
        UserError: they are missing, and `add_bytes` is not set.
    """
    if not add_bytes:
        raise UserError(
            "has no byte pieces: characters that it lacks, also after the expansion, become <unk> and are lost",
            key="base",
            value=file,
            remedy="Add the 256 byte pieces with add_bytes=true, or give another base",
        )
    for byte in range(256):
        proto.pieces.add(piece=f"<0x{byte:02X}>", score=0.0, type=_PIECE.BYTE)
    proto.trainer_spec.byte_fallback = True
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return 256


def _refuse_unknown_names(proto: sp_pb2.ModelProto, folder: Path) -> None:
    pieces = {piece.piece for piece in proto.pieces}
    for name in NAMED:
        token = content(settings_of(folder).get(name))
        if token is not None and token not in pieces:
            raise UserError(
                f"{name} is {token!r}, which has no id; a new piece would get its id on loading",
                key="base",
                value=folder,
                remedy=f"Add it to the base (tokenizer and rows), or set another {name}",
            )
