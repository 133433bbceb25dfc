"""Tokenizer files of a Hugging Face directory, written so that `AutoTokenizer` gives SentencePiece's ids."""

import json
import shutil
from pathlib import Path
from typing import Any

from google.protobuf.message import DecodeError
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds.errors import UserError
from fireflyds.tokenizer.settings import FLAGS, added_tokens, settings_of

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
    "pieces share scores (as in published Chinese-LLaMA vocabularies, or with cure=false), and AutoTokenizer cannot break "
    "such ties as SentencePiece does"
)
CUTS = "it has user-defined pieces and a dummy prefix, and AutoTokenizer puts no prefix before text that begins with a space"

_PIECE = sp_pb2.ModelProto.SentencePiece


def write_tokenizer(proto: sp_pb2.ModelProto, out: Path, source: Path | None = None) -> None:
    """Write `tokenizer.model`, `tokenizer.json` and `tokenizer_config.json`, with the settings of `source`.

    The JSON is made here because `LlamaTokenizer` of transformers 5 rebuilds its tokenizer and loses the
    merge order; `PreTrainedTokenizerFast` takes the JSON as it is.
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
        # Padding never carries loss or attention here; the field's habit for LLaMA bases is the end token.
        "pad_token": proto.pieces[spec.eos_id].piece,
        "model_max_length": 1_000_000_000,
        "clean_up_tokenization_spaces": False,
    }
    write_settings(out, defaults | settings, source)


def write_byte_level(document: dict[str, Any], out: Path) -> None:
    """Write a learnt byte-level tokenizer: its first two tokens are BOS and EOS."""
    bos, eos = (token["content"] for token in document["added_tokens"][:2])
    (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    settings = {"bos_token": bos, "eos_token": eos, "pad_token": eos, "model_max_length": 1_000_000_000}
    write_settings(out, settings | {"clean_up_tokenization_spaces": False}, None)


def write_settings(out: Path, settings: dict[str, Any], source: Path | None) -> None:
    """`tokenizer_config.json` for the class that takes `tokenizer.json` as it is, and the chat template."""
    settings = settings | {"tokenizer_class": "PreTrainedTokenizerFast"}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
    if source and (source / "chat_template.jinja").is_file():
        shutil.copy2(source / "chat_template.jinja", out)


def copy_tokenizer(source: Path, out: Path) -> None:
    """The tokenizer of a directory or of a bare `.model`, as a directory that `AutoTokenizer` loads.

    Without a `tokenizer.json` transformers would build a tokenizer of its own, with other ids, so one is written.
    """
    if source.is_dir():
        for name in FILES:
            if (source / name).exists():
                shutil.copy2(source / name, out / name)
    else:
        shutil.copy2(source, out / "tokenizer.model")
    if (out / "tokenizer.json").exists():
        return
    proto = read_proto(out / "tokenizer.model")
    try:
        write_tokenizer(proto, out)
    except UserError as error:
        print(f"note: no tokenizer.json is written ({error}); transformers may give other ids than SentencePiece")
        return
    if reason := disagreement(proto):
        print(f"note: {reason}; fireflyds encodes with SentencePiece")


def check_supported(proto: sp_pb2.ModelProto) -> None:
    """Raises `UserError` for a SentencePiece model that `tokenizer.json` cannot express in the way written here."""
    spec, normalizer = proto.trainer_spec, proto.normalizer_spec
    rules = {
        f"model_type is {spec.ModelType.Name(spec.model_type)}, not BPE": spec.model_type != spec.BPE,
        f"normalisation is {normalizer.name!r}, not identity": bool(normalizer.precompiled_charsmap),
        "it removes extra white space": normalizer.remove_extra_whitespaces,
        "it has no BOS or no EOS": min(spec.bos_id, spec.eos_id) < 0,
        "its space marks stand behind words": spec.treat_whitespace_as_suffix or not normalizer.escape_whitespaces,
    }
    broken = [rule for rule, applies in rules.items() if applies]
    if broken:
        raise UserError(
            f"tokenizer.model: {broken[0]}; this kind of SentencePiece model cannot be a base here. Use a LLaMA-style one"
        )


def disagreement(proto: sp_pb2.ModelProto) -> str | None:
    """Why `AutoTokenizer` cannot give SentencePiece's ids for every text, where it cannot."""
    if proto.trainer_spec.model_type != proto.trainer_spec.BPE:
        return None
    merged = [piece for piece in proto.pieces if piece.type == _PIECE.NORMAL and len(piece.piece) > 1]
    # LLaMA's runs of spaces share the score -1e9 without harm: any way of merging them gives the same run.
    scores = [piece.score for piece in merged if piece.score > -1e8]
    if len(set(scores)) < len(scores):
        # SentencePiece then merges the leftmost first, which the ranks of `tokenizer.json` cannot say.
        return TIES
    return CUTS if _cuts_behind_prefix(proto) else None


def read_proto(file: Path) -> sp_pb2.ModelProto:
    """A `.model` as it is.

    Raises:
        UserError: it is none.
    """
    proto = sp_pb2.ModelProto()
    try:
        proto.ParseFromString(file.read_bytes())
    except (DecodeError, OSError) as error:
        raise UserError(f"{file}: not a SentencePiece model ({error}). Give a tokenizer.model of that kind") from error
    return proto


def _cuts_behind_prefix(proto: sp_pb2.ModelProto) -> bool:
    """A user-defined piece cuts the text, and a normalizer would put the prefix behind every cut."""
    defined = any(piece.type == _PIECE.USER_DEFINED for piece in proto.pieces)
    return proto.normalizer_spec.add_dummy_prefix and defined


def _fast_tokenizer(
    proto: sp_pb2.ModelProto, settings: dict[str, Any], added: dict[str, dict[str, Any]]
) -> dict[str, object]:
    """The document of `tokenizer.json`: SentencePiece's BPE in the terms of `tokenizers`."""
    prefix = proto.normalizer_spec.add_dummy_prefix
    spaces = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    back = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    normalizers = [*([{"type": "Prepend", "prepend": "▁"}] if prefix else []), spaces]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    cut = _cuts_behind_prefix(proto)
    once = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(proto, added),
        "normalizer": None if cut else {"type": "Sequence", "normalizers": normalizers},
        "pre_tokenizer": once if cut else None,
        "post_processor": _post_processor(proto, settings),
        "decoder": {"type": "Sequence", "decoders": [back, {"type": "ByteFallback"}, {"type": "Fuse"}, *strip]},
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


def _added_tokens(proto: sp_pb2.ModelProto, known: dict[str, dict[str, Any]]) -> list[dict[str, object]]:
    """Control and user-defined pieces, with the flags they had in the base."""
    special = {_PIECE.CONTROL: True, _PIECE.UNKNOWN: True, _PIECE.USER_DEFINED: False}
    return [
        {
            "id": index,
            "content": piece.piece,
            **{flag: known.get(piece.piece, {}).get(flag, False) for flag in FLAGS},
            "special": special[piece.type],
        }
        for index, piece in enumerate(proto.pieces)
        if piece.type in special
    ]


def _merges(proto: sp_pb2.ModelProto) -> list[list[str]]:
    """All two-piece splits of every piece, in the order of the merged piece's score (SentencePiece's own priority)."""
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
    """BOS in front, as LLaMA's tokenizers do by default, or as `add_bos_token` and `add_eos_token` say."""
    spec = proto.trainer_spec
    ids = {proto.pieces[index].piece: index for index in (spec.bos_id, spec.eos_id)}
    bos, eos = ids
    before = [{"SpecialToken": {"id": bos, "type_id": 0}}] if settings.get("add_bos_token", True) else []
    after = [{"SpecialToken": {"id": eos, "type_id": 0}}] if settings.get("add_eos_token", False) else []
    first, second = ({"Sequence": {"id": name, "type_id": kind}} for name, kind in (("A", 0), ("B", 1)))
    return {
        "type": "TemplateProcessing",
        "single": [*before, first, *after],
        "pair": [*before, first, *after, *before, second, *after],
        "special_tokens": {token: {"id": token, "ids": [index], "tokens": [token]} for token, index in ids.items()},
    }
