"""Readers for lists of pieces to merge."""

import json
import re
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds.errors import UserError
from fireflyds.tokenizer.byte_level import byte_values

# Lists with further columns, which every line must have.
_NUMBER = r"-?\d+(?:\.\d+)?(?:e[+-]?\d+)?"
_COLUMNS = {
    re.compile(rf"(.+)\t{_NUMBER}"): "pieces with scores, as in a SentencePiece .vocab",
    re.compile(
        rf"(\S+)[ \t]+{_NUMBER}(?:[ \t]+[A-Za-z]\w*)?"
    ): "words with frequencies and tags, as in a jieba dictionary",
}
_SPECIAL = re.compile(r"<[^<>\s]+>")


def read_pieces(path: Path) -> list[str]:
    """Returns the texts of pieces to merge, of one of these files.

    A `.model`; a `tokenizer.json` or `vocab.json`; or text with one piece per line, also as the first column of a
    SentencePiece `.vocab` (piece, score) or of a jieba dictionary (word, frequency, tag).

    Raises:
        UserError: the file does not exist, has none of these formats, or has no piece or a duplicate one.
    """
    if not path.is_file():
        raise UserError(
            "no such file",
            key="pieces",
            value=path,
            remedy="Give a SentencePiece .model, tokenizer.json or list with one piece per line",
        )
    try:
        if path.suffix == ".model":
            return normal_pieces(path.read_bytes())
        if path.suffix == ".json":
            return _json_pieces(path)
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]
    except DecodeError as error:
        raise UserError(
            f"not a SentencePiece model ({error})", key="pieces", value=path, remedy="Give another file"
        ) from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"not UTF-8 ({error.reason} at byte {error.start})",
            key="pieces",
            value=path,
            remedy="Save the list as UTF-8",
        ) from error
    lines = _first_columns(lines, path)
    first_lines: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        piece = line.replace("▁", " ")
        if line and first_lines.setdefault(piece, number) != number:
            raise UserError(
                f"piece {line!r} is already in line {first_lines[piece]}", key=f"{path}:{number}", remedy="Remove one"
            )
    if not first_lines:
        raise UserError("there is no piece in it", key="pieces", value=path, remedy="Write one piece per line")
    return list(first_lines)


def _first_columns(lines: list[str], path: Path) -> list[str]:
    """Returns the pieces of a list with further columns, if every line has them; otherwise the lines."""
    present = [(number, line) for number, line in enumerate(lines, 1) if line]
    for pattern, columns in _COLUMNS.items():
        others = [(number, line) for number, line in present if not pattern.fullmatch(line)]
        if present and not others:
            print(f"{path}: read as {columns}; the pieces are the first column")
            pieces = [match[1] if (match := pattern.fullmatch(line)) else "" for line in lines]
            return ["" if _SPECIAL.fullmatch(piece) or not piece.strip("▁") else piece for piece in pieces]
        if 2 * len(others) < len(present):
            raise UserError(
                f"{others[0][1]!r} differs from most lines, which are {columns}",
                key=f"{path}:{others[0][0]}",
                remedy="Give every line the same columns, or the pieces alone",
            )
    for number, line in present:
        if "\t" in line:
            raise UserError(f"{line!r} holds a tab", key=f"{path}:{number}", remedy="Write one piece per line")
    return lines


def normal_pieces(model: bytes) -> list[str]:
    """Returns the texts of a serialised SentencePiece model's pieces, in order, without special and byte pieces."""
    proto = sp_pb2.ModelProto()
    proto.ParseFromString(model)
    normal = sp_pb2.ModelProto.SentencePiece.NORMAL
    return [piece.piece.replace("▁", " ") for piece in proto.pieces if piece.type == normal]


def _json_pieces(path: Path) -> list[str]:
    values = byte_values()
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        # `vocab.json` is the vocabulary alone; byte-level BPE spells a space as Ġ.
        is_vocab = bool(document) and all(isinstance(index, int) for index in document.values())
        vocab = sorted((document if is_vocab else document["model"]["vocab"]).items(), key=lambda item: item[1])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"not a tokenizer.json ({type(error).__name__}: {error})",
            key="pieces",
            value=path,
            remedy="Get the file again, or give a list",
        ) from error
    components = json.dumps([document.get("pre_tokenizer"), document.get("decoder")])
    is_byte_level = any("Ġ" in piece for piece, _ in vocab) if is_vocab else '"ByteLevel"' in components
    if not is_byte_level:
        return [piece.replace("▁", " ") for piece, _ in vocab]
    texts = []
    for piece, _ in vocab:
        if all(character in values for character in piece):
            text = bytes(values[character] for character in piece).decode("utf-8", "ignore")
            if len(text.encode()) == len(piece):
                texts.append(text)
    return texts
