"""Readers for lists of pieces to merge."""

import json
from pathlib import Path

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds.errors import UserError
from fireflyds.tokenizer.encoder import byte_values


def read_pieces(path: Path) -> list[str]:
    """Returns the texts of pieces to merge: of a `.model`, a `tokenizer.json`, or a text file with one piece per line.

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
        vocab = sorted(document["model"]["vocab"].items(), key=lambda item: item[1])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"not a tokenizer.json ({type(error).__name__}: {error})",
            key="pieces",
            value=path,
            remedy="Get the file again, or give a list",
        ) from error
    if '"ByteLevel"' not in json.dumps([document.get("pre_tokenizer"), document.get("decoder")]):
        return [piece.replace("▁", " ") for piece, _ in vocab]
    texts = []
    for piece, _ in vocab:
        if all(character in values for character in piece):
            text = bytes(values[character] for character in piece).decode("utf-8", "ignore")
            if len(text.encode()) == len(piece):
                texts.append(text)
    return texts
