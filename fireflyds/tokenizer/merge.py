"""Merge new pieces into a SentencePiece base: ids of old text stay, and every new piece can be reached."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds.errors import UserError
from fireflyds.tokenizer.learn import NORMAL, has_han, has_new_script, normal_pieces


@dataclass(slots=True)
class Merged:
    """A merged vocabulary and what was done to make it sound."""

    proto: sp_pb2.ModelProto
    num_base: int
    added: list[str] = field(default_factory=list)
    intermediates: list[str] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    filled: list[str] = field(default_factory=list)


def read_pieces(path: Path) -> list[str]:
    """Pieces to merge, from a `.model` or from a UTF-8 text file with one piece a line.

    Raises:
        UserError: the file is not there, not readable as either, or has a piece twice.
    """
    if not path.is_file():
        raise UserError(f"pieces={path}: no such file. Give a SentencePiece .model or a list with one piece a line")
    if path.suffix == ".model":
        return normal_pieces(path.read_bytes())
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
    except UnicodeDecodeError as error:
        raise UserError(
            f"pieces={path}: not UTF-8 ({error.reason} at byte {error.start}). Save the list as UTF-8"
        ) from error
    first_seen: dict[str, int] = {}
    for number, piece in enumerate(lines, 1):
        if piece and first_seen.setdefault(piece, number) != number:
            raise UserError(f"{path}:{number}: piece {piece!r} stands already in line {first_seen[piece]}. Remove one")
    return list(first_seen)


def merge(base: bytes, pieces: list[str], *, cure: bool, vocab_multiple: int) -> Merged:
    """Append to a base SentencePiece model the pieces it does not have.

    With `cure` the result is sound: pieces without a character of the new scripts are dropped (text without
    them keeps its ids), every character of a new piece is itself a piece, scores are distinct and in merge
    order, and a piece that no sequence of merges reaches gets the intermediate it lacks or is dropped. The
    vocabulary is then filled with further Han characters up to a multiple of `vocab_multiple`.

    Without `cure` pieces are appended as they are with score 0, as the published Chinese-LLaMA vocabularies
    were made.

    Raises:
        UserError: nothing would be added.
    """
    proto = sp_pb2.ModelProto()
    proto.ParseFromString(base)
    known = {piece.piece for piece in proto.pieces}
    merged = Merged(proto, len(proto.pieces))
    new = [piece for piece in pieces if piece not in known]
    if cure:
        kept = [piece for piece in new if has_new_script(piece) and _characters_are_sound(piece, known)]
        merged.dropped = sorted(set(new) - set(kept))
        new = _with_characters(kept, known)
    if not new:
        raise UserError(
            f"pieces: all {len(pieces)} are in the base already or were dropped. Give other pieces or a larger corpus"
        )
    merged.added = new
    if cure:
        _make_reachable(merged)
    _fill(merged, vocab_multiple)
    _append(merged, score_ties=not cure)
    return merged


def unreachable(model: bytes, pieces: list[str]) -> list[str]:
    """The pieces that encoding newline + piece + newline does not yield."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    encoded = processor.encode([f"\n{piece}\n" for piece in pieces])
    return [piece for piece, ids in zip(pieces, encoded, strict=True) if processor.piece_to_id(piece) not in ids]


def _characters_are_sound(piece: str, known: set[str]) -> bool:
    """Every character is a piece already, or of a new script and so may become one."""
    return all(character in known or has_new_script(character) for character in piece)


def _with_characters(pieces: list[str], known: set[str]) -> list[str]:
    """Characters first: byte fallback cannot merge, so a piece needs each of its characters as a piece."""
    characters = {c: None for piece in pieces for c in piece.removeprefix("▁") if c not in known}
    return list(characters | dict.fromkeys(pieces))


def _serialised(merged: Merged, pieces: list[str], *, score_ties: bool = False) -> bytes:
    proto = sp_pb2.ModelProto()
    proto.CopyFrom(merged.proto)
    del proto.pieces[merged.num_base :]
    lowest = min(piece.score for piece in proto.pieces if piece.type == NORMAL and piece.score > -1e8)
    for rank, piece in enumerate(pieces, 1):
        # Below all of the base and distinct, so that the order of merges leaves nothing to chance.
        proto.pieces.add(piece=piece, score=0.0 if score_ties else lowest - rank, type=NORMAL)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return bytes(proto.SerializeToString())


def _make_reachable(merged: Merged) -> None:
    """Give unreachable pieces the intermediate they lack, a few rounds long; drop what is left."""
    for _ in range(4):
        model = _serialised(merged, merged.added)
        dead = unreachable(model, merged.added)
        if not dead:
            return
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        known = set(merged.added)
        before: dict[str, str] = {}
        for piece in dead:
            parts = processor.encode(f"\n{piece}", out_type=str)[2:]
            step = "".join(parts[:2])
            # An intermediate without a new character would change how old text is encoded.
            if len(parts) > 2 and step not in known and has_new_script(step):
                known.add(step)
                before[piece] = step
        if not before:
            break
        merged.intermediates += before.values()
        merged.added = [
            each for piece in merged.added for each in ([before[piece], piece] if piece in before else [piece])
        ]
    while dead := unreachable(_serialised(merged, merged.added), merged.added):
        merged.dropped += [piece for piece in dead if piece not in merged.intermediates]
        merged.intermediates = [piece for piece in merged.intermediates if piece not in set(dead)]
        merged.added = [piece for piece in merged.added if piece not in set(dead)]


def _fill(merged: Merged, multiple: int) -> None:
    """Reach the multiple by characters that would otherwise cost three byte tokens each, not by dead rows."""
    missing = -(merged.num_base + len(merged.added)) % multiple
    known = {piece.piece for piece in merged.proto.pieces} | set(merged.added)
    characters = (c for c in _common_han() if c not in known)
    merged.filled = list(islice(characters, missing))
    if len(merged.filled) < missing:
        raise UserError(
            f"vocab_multiple={multiple}: {missing:,} more pieces would be needed, and there are {len(merged.filled):,} "
            "further Han characters. Give a smaller multiple"
        )


def _common_han() -> Iterator[str]:
    """The characters of GB 2312, level 1 (the 3,755 most used) first, then the rest of the basic Han block."""
    listed = [bytes((row, cell)).decode("gb2312", "ignore") for row in range(0xB0, 0xF8) for cell in range(0xA1, 0xFF)]
    return iter({c: None for c in listed + [chr(code) for code in range(0x4E00, 0xA000)] if c and has_han(c)})


def _append(merged: Merged, *, score_ties: bool) -> None:
    merged.proto.ParseFromString(_serialised(merged, merged.added + merged.filled, score_ties=score_ties))
