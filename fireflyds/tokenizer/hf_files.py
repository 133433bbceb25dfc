"""Writes the tokenizer files of a Hugging Face directory such that `AutoTokenizer` returns SentencePiece's ids."""

import json
import shutil
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.tokenizer.settings import FLAGS, added_tokens, content, settings_of, without_limits

FILES = (
    "tokenizer.model",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)

TIES = (
    "pieces share scores (as in published Chinese-LLaMA vocabularies, or with cure=false), and AutoTokenizer does not "
    "break such ties in SentencePiece's order"
)
CUTS = (
    "the model has user-defined pieces and a dummy prefix, and AutoTokenizer adds no prefix to text that begins with a "
    "space"
)

_PIECE = sp_pb2.ModelProto.SentencePiece


def write_tokenizer(proto: sp_pb2.ModelProto, out: Path, source: Path | None = None) -> None:
    """Writes `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`, with the settings of `source`.

    The JSON is generated here because `LlamaTokenizer` of transformers 5 rebuilds its tokenizer and loses the
    merge order; `PreTrainedTokenizerFast` loads the JSON unchanged.

    Raises:
        UserError: `tokenizer.json` cannot express the model.
    """
    check_supported(proto)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.model").write_bytes(proto.SerializeToString())
    settings = settings_of(source)
    added = {row["content"]: row for row in added_tokens(source)} if source else {}
    document = _fast_tokenizer(proto, settings, added)
    (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    spec = proto.trainer_spec
    defaults = {
        "bos_token": proto.pieces[spec.bos_id].piece,
        "eos_token": proto.pieces[spec.eos_id].piece,
        "unk_token": proto.pieces[spec.unk_id].piece,
        # Padding has neither loss nor attention here; for LLaMA base models, EOS is the usual padding token.
        "pad_token": proto.pieces[spec.eos_id].piece,
        "model_max_length": 1_000_000_000,
        "clean_up_tokenization_spaces": False,
    }
    write_settings(out, defaults | settings, source)


def write_byte_level(document: dict[str, Any], out: Path) -> None:
    """Writes a learned byte-level tokenizer, whose first two added tokens are BOS and EOS."""
    bos, eos = (token["content"] for token in document["added_tokens"][:2])
    (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    settings = {"bos_token": bos, "eos_token": eos, "pad_token": eos, "model_max_length": 1_000_000_000}
    write_settings(out, settings | {"clean_up_tokenization_spaces": False}, None)


def write_settings(out: Path, settings: dict[str, Any], source: Path | None) -> None:
    """Writes `tokenizer_config.json` for `PreTrainedTokenizerFast`, and copies the chat template of `source`."""
    settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
    if source and (source / "chat_template.jinja").is_file():
        shutil.copy2(source / "chat_template.jinja", out)


def copy_tokenizer(source: Path, out: Path) -> None:
    """Copies the tokenizer of a directory or of a `.model` file to a directory that `AutoTokenizer` loads.

    If there is no `tokenizer.json`, one is written: the conversion in transformers may return other ids.
    """
    if source.is_dir():
        for name in FILES:
            if (source / name).exists():
                shutil.copy2(source / name, out / name)
    else:
        shutil.copy2(source, out / "tokenizer.model")
    if (out / "tokenizer.json").exists():
        _switch_off_limits(out / "tokenizer.json")
        return
    proto = read_proto(out / "tokenizer.model")
    try:
        write_tokenizer(proto, out)
    except UserError as error:
        print(f"note: tokenizer.json is not written ({error}); transformers may return other ids than SentencePiece")
        return
    if reason := disagreement(proto):
        print(f"note: {reason}; fireflyds encodes with SentencePiece")


def _switch_off_limits(file: Path) -> None:
    document = read_json(file)
    if "model" in document and without_limits(document) != document:
        file.write_text(json.dumps(without_limits(document), ensure_ascii=False), encoding="utf-8")
        print("note: truncation, padding and dropout of the base's tokenizer.json are switched off")


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


def disagreement(proto: sp_pb2.ModelProto) -> str | None:
    """Returns the reason why `AutoTokenizer` cannot return SentencePiece's ids for every text; None where it can."""
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        return None
    merged = [piece for piece in proto.pieces if piece.type == _PIECE.NORMAL and len(piece.piece) > 1]
    # LLaMA's pieces of several spaces share the score -1e9; this is harmless, as any merge order yields the same piece.
    scores = [piece.score for piece in merged if piece.score > -1e8]
    if len(set(scores)) < len(scores):
        # SentencePiece then merges the leftmost pair first, which the ranks of `tokenizer.json` cannot express.
        return TIES
    return CUTS if _splits_after_prefix(proto) else None


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


def _splits_after_prefix(proto: sp_pb2.ModelProto) -> bool:
    """True where user-defined pieces split the text; a `Prepend` normalizer would add a prefix after every split."""
    defined = any(piece.type == _PIECE.USER_DEFINED for piece in proto.pieces)
    return proto.normalizer_spec.add_dummy_prefix and defined


def _fast_tokenizer(
    proto: sp_pb2.ModelProto, settings: dict[str, Any], added: dict[str, dict[str, Any]]
) -> dict[str, object]:
    """Returns the contents of `tokenizer.json`: SentencePiece's BPE expressed with the components of `tokenizers`."""
    prefix = proto.normalizer_spec.add_dummy_prefix
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    unescape = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    normalizers = [*([{"type": "Prepend", "prepend": "▁"}] if prefix else []), escape]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    splits_text = _splits_after_prefix(proto)
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(proto, added),
        "normalizer": None if splits_text else {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": metaspace if splits_text else None,
        "post_processor": _post_processor(proto, settings),
        "decoder": {"type": "Sequence", "decoders": [unescape, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": proto.pieces[proto.trainer_spec.unk_id].piece,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": bool(proto.trainer_spec.byte_fallback),
            "ignore_merges": False,
            "vocab": {piece.piece: index for index, piece in enumerate(proto.pieces)},
            "merges": _merges(proto),
        },
    }


def _added_tokens(proto: sp_pb2.ModelProto, base_tokens: dict[str, dict[str, Any]]) -> list[dict[str, object]]:
    """Returns the control, unknown and user-defined pieces as added tokens, with their flags in the base."""
    special = {_PIECE.CONTROL: True, _PIECE.UNKNOWN: True, _PIECE.USER_DEFINED: False}
    return [
        {
            "id": index,
            "content": piece.piece,
            **{flag: base_tokens.get(piece.piece, {}).get(flag, False) for flag in FLAGS},
            "special": special[piece.type],
        }
        for index, piece in enumerate(proto.pieces)
        if piece.type in special
    ]


def _merges(proto: sp_pb2.ModelProto) -> list[list[str]]:
    """Returns all splits of pieces into two pieces, by descending score of the merged piece (SentencePiece's order)."""
    index = {piece.piece: number for number, piece in enumerate(proto.pieces) if piece.type == _PIECE.NORMAL}
    ranked = sorted((piece for piece in proto.pieces if piece.type == _PIECE.NORMAL), key=lambda piece: -piece.score)
    merges = []
    for piece in ranked:
        text = piece.piece
        splits = [
            (text[:cut], text[cut:]) for cut in range(1, len(text)) if text[:cut] in index and text[cut:] in index
        ]
        merges += [list(split) for split in sorted(splits, key=lambda split: (index[split[0]], index[split[1]]))]
    return merges


def _post_processor(proto: sp_pb2.ModelProto, settings: dict[str, Any]) -> dict[str, object] | None:
    """Returns the template that adds BOS and EOS as in `add_bos_token` (default: true) and `add_eos_token` (false)."""
    spec, indices = proto.trainer_spec, {piece.piece: index for index, piece in enumerate(proto.pieces)}
    bos, eos = (
        name if (name := content(settings.get(key))) in indices else proto.pieces[index].piece
        for key, index in (("bos_token", spec.bos_id), ("eos_token", spec.eos_id))
    )
    before = [{"SpecialToken": {"id": bos, "type_id": 0}}] if settings.get("add_bos_token", True) else []
    after = [{"SpecialToken": {"id": eos, "type_id": 0}}] if settings.get("add_eos_token", False) else []
    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for name, type_id in (("A", 0), ("B", 1)))
    return {
        "type": "TemplateProcessing",
        "single": [*before, first, *after],
        "pair": [*before, first, *after, *before, second, *after],
        "special_tokens": {token: {"id": token, "ids": [indices[token]], "tokens": [token]} for token in (bos, eos)},
    }
