"""Tokenizers of kinds that transformers reads with classes of its own, as their makers publish them, in small."""

import json
from pathlib import Path

from bases import byte_level_base, sentencepiece_base
from samples import ENGLISH
from sentencepiece import SentencePieceTrainer
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds.tokenizer.hf_files import write_tokenizer

FLAGS = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}


def phi3(folder: Path) -> Path:
    """LLaMA's pieces, and role tokens that strip the white space after them."""
    sentencepiece_base(folder)
    names = ["<|endoftext|>", "<|assistant|>", "<|system|>", "<|end|>", "<|user|>"]
    rows = {400 + n: FLAGS | {"content": name, "rstrip": name != names[0]} for n, name in enumerate(names)}
    _add(folder, rows, {"eos_token": names[0], "pad_token": names[0]})
    return folder


def internlm2(folder: Path) -> Path:
    """A `.model` alone with unused pieces, to which the settings give names."""
    sentencepiece_base(folder)
    (folder / "tokenizer.json").unlink()
    proto = sp_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    for number in (145, 146):
        proto.pieces.add(piece=f"[UNUSED_TOKEN_{number}]", score=0.0, type=sp_pb2.ModelProto.SentencePiece.USER_DEFINED)
    proto.trainer_spec.vocab_size = len(proto.pieces)
    (folder / "tokenizer.model").write_bytes(proto.SerializeToString())
    names = {index: FLAGS | {"content": name} for index, name in ((400, "<|im_end|>"), (401, "<|im_start|>"))}
    settings = {"tokenizer_class": "InternLM2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"added_tokens_decoder": names}))
    return folder


def gemma(folder: Path) -> Path:
    """No dummy prefix; newlines and runs of spaces are pieces of their own."""
    folder.mkdir(parents=True)
    (folder / "lines.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    SentencePieceTrainer.train(
        input=str(folder / "lines.txt"),
        model_prefix=str(folder / "tokenizer"),
        model_type="bpe",
        vocab_size=420,
        byte_fallback=True,
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        control_symbols=["<start_of_turn>", "<end_of_turn>"],
        user_defined_symbols=["\n", "\n\n", "▁▁", "▁▁▁"],
        hard_vocab_limit=False,
        minloglevel=2,
    )
    settings = {"tokenizer_class": "GemmaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def deepseek(folder: Path) -> Path:
    """Byte-level BPE whose settings name LLaMA's class, and ask for a BOS that the file itself does not add."""
    byte_level_base(folder)
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["post_processor"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": False}
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    settings |= {"tokenizer_class": "LlamaTokenizerFast", "add_bos_token": True, "legacy": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def without_legacy(folder: Path) -> Path:
    """LLaMA's pieces without a space after special tokens: `legacy=false`, and no `tokenizer.json`."""
    phi3(folder)
    (folder / "tokenizer.json").unlink()
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"legacy": False}))
    return folder


def without_byte_fallback(folder: Path) -> Path:
    """A `.model` in which characters outside its pieces are unknown."""
    sentencepiece_base(folder)
    proto = sp_pb2.ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    kept = [piece for piece in proto.pieces if piece.type != sp_pb2.ModelProto.SentencePiece.BYTE]
    del proto.pieces[:]
    proto.pieces.extend(kept)
    proto.trainer_spec.vocab_size, proto.trainer_spec.byte_fallback = len(kept), False
    write_tokenizer(proto, folder)
    return folder


def _add(folder: Path, rows: dict[int, dict[str, object]], settings: dict[str, object]) -> None:
    document = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    document["added_tokens"] += [row | {"id": index} for index, row in rows.items()]
    (folder / "tokenizer.json").write_text(json.dumps(document), encoding="utf-8")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"tokenizer_class": "LlamaTokenizer", "added_tokens_decoder": rows} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
