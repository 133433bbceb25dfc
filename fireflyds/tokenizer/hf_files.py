"""Writes the tokenizer files of a Hugging Face directory such that `AutoTokenizer` returns SentencePiece's ids."""

import json
import shutil
from pathlib import Path
from typing import Any

from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.tokenizer.auto_tokenizer import compare
from fireflyds.tokenizer.encoder import load_encoder, model_file
from fireflyds.tokenizer.sentencepiece_model import check_supported, directory_proto, disagreement, splits_after_prefix
from fireflyds.tokenizer.settings import (
    FLAGS,
    added_tokens,
    content,
    settings_of,
    with_bos,
    without_limits,
)

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
    document = _fast_tokenizer(proto, settings, added, splits_text=splits_after_prefix(proto, source))
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
    """Copies the tokenizer of a directory or of a `.model` file to `out`, where `AutoTokenizer` then gives its ids.

    If there is no `tokenizer.json`, one is written: the conversion in transformers may return other ids. Where the
    class that transformers takes for the directory builds other ids than the files say, `PreTrainedTokenizerFast` is
    written as its class. A `config.json` must already stand in `out`, as transformers chooses the class by it.

    Raises:
        UserError: transformers would still give other ids.
    """
    if source.is_dir():
        for name in FILES:
            if (source / name).exists():
                shutil.copy2(source / name, out / name)
    else:
        shutil.copy2(source, out / "tokenizer.model")
    folder, file = source if source.is_dir() else None, model_file(out)
    proto = directory_proto(file, folder)[0] if file else None
    known_reason = disagreement(proto, folder) if proto else None
    if (out / "tokenizer.json").exists():
        _switch_off_limits(out / "tokenizer.json")
    elif proto:
        try:
            write_tokenizer(proto, out, folder)
        except UserError as error:
            known_reason = str(error)
    _require_agreement(source, out, known_reason)


def _require_agreement(source: Path, out: Path, known_reason: str | None) -> None:
    encoder = load_encoder(source)
    difference = compare(out, encoder)
    if difference and (out / "tokenizer.json").exists():
        ids = {"bos_token": encoder.bos_id, "eos_token": encoder.eos_id}
        names = {key: encoder.token(index) for key, index in ids.items() if index is not None}
        settings = names | settings_of(out)
        if encoder.adds_bos and encoder.bos_id is not None:
            bos = str(content(settings["bos_token"]))
            document = with_bos(read_json(out / "tokenizer.json"), bos, encoder.bos_id)
            (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        write_settings(out, settings, None)
        if not compare(out, encoder):
            print(f"note: {difference}; written with tokenizer_class=PreTrainedTokenizerFast, which gives the same ids")
            return
    if known_reason:
        print(f"note: {known_reason}; fireflyds encodes with SentencePiece")
    elif difference:
        raise UserError(
            f"{difference}",
            key=f"tokenizer {source}",
            remedy="Give the tokenizer.json and tokenizer_config.json of the model's makers, and train with them",
        )


def _switch_off_limits(file: Path) -> None:
    document = read_json(file)
    if "model" in document and without_limits(document) != document:
        file.write_text(json.dumps(without_limits(document), ensure_ascii=False), encoding="utf-8")
        print("note: truncation, padding and dropout of the base's tokenizer.json are switched off")


def _fast_tokenizer(
    proto: sp_pb2.ModelProto, settings: dict[str, Any], added: dict[str, dict[str, Any]], *, splits_text: bool
) -> dict[str, object]:
    """Returns the contents of `tokenizer.json`: SentencePiece's BPE expressed with the components of `tokenizers`."""
    prefix = proto.normalizer_spec.add_dummy_prefix
    escape = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
    unescape = {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}
    normalizers = [*([{"type": "Prepend", "prepend": "▁"}] if prefix else []), escape]
    strip = [{"type": "Strip", "content": " ", "start": 1, "stop": 0}] if prefix else []
    # `Prepend` adds the prefix after every added token, `Metaspace` only at the beginning.
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
            # Pieces with `▁` are found in normalized text, where it stands for a space.
            **({"normalized": True} if "▁" in piece.piece and piece.type == _PIECE.USER_DEFINED else {}),
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
