"""SentencePiece models of Hugging Face directories: the pieces with the added tokens and names of the settings."""

from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds.errors import UserError
from fireflyds.tokenizer.settings import added_tokens, prefixes_after_special

TIES = (
    "pieces share scores (as in published Chinese-LLaMA vocabularies, or with cure=false), and AutoTokenizer does not "
    "break such ties in SentencePiece's order"
)
CUTS = (
    "the model has a dummy prefix only at the beginning of text (user-defined pieces, or legacy=false), and "
    "AutoTokenizer adds none to text that begins with a space"
)

_PIECE = sp_pb2.ModelProto.SentencePiece


def directory_proto(file: Path, folder: Path | None) -> tuple[sp_pb2.ModelProto, list[dict[str, Any]]]:
    """Reads the model of a directory, with its added tokens as pieces. Returns the tokens for which that is impossible:
    their ids do not follow the last piece.

    `added_tokens_decoder` may name ids that the model has unused pieces for (InternLM2's `[UNUSED_TOKEN_145]` is
    `<|im_start|>`); these pieces get its names.

    Raises:
        UserError: the file cannot be read or is not a SentencePiece model.
    """
    proto = read_proto(file)
    index_of = {piece.piece: index for index, piece in enumerate(proto.pieces)}
    remaining = []
    for row in added_tokens(folder) if folder else []:
        name, index = row["content"], row["id"]
        piece_type = _PIECE.CONTROL if row["special"] else _PIECE.USER_DEFINED
        if name in index_of:
            continue
        if index < len(proto.pieces):
            proto.pieces[index].piece, proto.pieces[index].type = name, piece_type
        elif index == len(proto.pieces):
            proto.pieces.add(piece=name, score=0.0, type=piece_type)
        else:
            remaining.append(row)
            continue
        index_of[name] = index
    proto.trainer_spec.vocab_size = len(proto.pieces)
    return proto, remaining


def check_supported(proto: sp_pb2.ModelProto) -> None:
    """Checks that `tokenizer.json` can express a SentencePiece model.

    Raises:
        UserError: the model is not a BPE model in the style of LLaMA.
    """
    spec, normalizer = proto.trainer_spec, proto.normalizer_spec
    rules = {
        f"model_type is {spec.ModelType.Name(spec.model_type)}, not BPE": spec.model_type != spec.BPE,
        f"normalisation is {normalizer.name!r}, not identity": bool(normalizer.precompiled_charsmap),
        "it removes extra white space": normalizer.remove_extra_whitespaces,
        "it has no BOS or no EOS": min(spec.bos_id, spec.eos_id) < 0,
        "its space marks follow words": spec.treat_whitespace_as_suffix or not normalizer.escape_whitespaces,
    }
    violations = [rule for rule, applies in rules.items() if applies]
    if violations:
        raise UserError(
            f"{violations[0]}; this type of model is not supported as a base",
            key="tokenizer.model",
            remedy="Use a LLaMA-style one",
        )


def disagreement(proto: sp_pb2.ModelProto, folder: Path | None = None) -> str | None:
    """Returns the reason why `AutoTokenizer` cannot return SentencePiece's ids for every text; None where it can.

    `folder`: the directory whose settings say whether text after special tokens gets the dummy prefix.
    """
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        return None
    merged = [piece for piece in proto.pieces if piece.type == _PIECE.NORMAL and len(piece.piece) > 1]
    # LLaMA's pieces of several spaces share the score -1e9; this is harmless, as any merge order yields the same piece.
    scores = [piece.score for piece in merged if piece.score > -1e8]
    if len(set(scores)) < len(scores):
        # SentencePiece then merges the leftmost pair first, which the ranks of `tokenizer.json` cannot express.
        return TIES
    return CUTS if splits_after_prefix(proto, folder) else None


def read_proto(file: Path) -> sp_pb2.ModelProto:
    """Reads a SentencePiece `.model` file.

    Raises:
        UserError: the file cannot be read or is not a SentencePiece model.
    """
    proto = sp_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except (DecodeError, OSError) as error:
        raise UserError(
            f"not a SentencePiece model ({error})", key=file, remedy="Give a SentencePiece tokenizer.model"
        ) from error
    return proto


def splits_after_prefix(proto: sp_pb2.ModelProto, folder: Path | None) -> bool:
    """True where text is split before the prefix is added: a `Prepend` normalizer would add one after every split."""
    defined = any(piece.type == _PIECE.USER_DEFINED for piece in proto.pieces)
    return proto.normalizer_spec.add_dummy_prefix and (
        defined or not (folder is None or prefixes_after_special(folder))
    )
