"""Small base tokenizers of every kind that pieces are merged into."""

import json
from pathlib import Path

from samples import ENGLISH
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds.tokenizer.hf_files import write_byte_level, write_tokenizer
from fireflyds.tokenizer.learn import learn_bpe, learn_byte_level

# Llama-3's pre-tokenizer keeps a run of letters together with one other character before it.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
ADDED = ["<|begin|>", "<|end|>", "<|reserved_0|>"]


def sentencepiece_base(folder: Path, vocab_size: int = 400) -> Path:
    """LLaMA-2's kind: `tokenizer.model` with byte fallback and a dummy prefix."""
    proto = sp_pb2.ModelProto()
    proto.ParseFromString(learn_bpe(ENGLISH, vocab_size=vocab_size, max_piece_length=12))
    write_tokenizer(proto, folder)
    return folder


def byte_level_base(folder: Path) -> Path:
    """GPT-2's and Falcon's kind."""
    folder.mkdir(parents=True)
    write_byte_level(learn_byte_level(ENGLISH, vocab_size=420, max_piece_length=12), folder)
    return folder


def llama3_base(folder: Path) -> Path:
    """Llama-3's and Qwen's kind: added tokens after the vocabulary, merges as strings, `ignore_merges`."""
    byte_level_base(folder)
    file = folder / "tokenizer.json"
    document = json.loads(file.read_text(encoding="utf-8"))
    special_tokens = {token["content"] for token in document["added_tokens"]}
    vocab = [
        token
        for token in sorted(document["model"]["vocab"], key=document["model"]["vocab"].get)
        if token not in special_tokens
    ]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    document["added_tokens"] = [{"id": len(vocab) + i, "content": token, **flags} for i, token in enumerate(ADDED)]
    merges = [" ".join(pair) for pair in document["model"]["merges"]]
    document["model"] |= {
        "vocab": {token: index for index, token in enumerate(vocab)},
        "merges": merges,
        "ignore_merges": True,
    }
    split = {"type": "Split", "pattern": {"Regex": LLAMA3_SPLIT}, "behavior": "Isolated", "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    document["post_processor"] = None
    file.write_text(json.dumps(document), encoding="utf-8")
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": ADDED[0], "eos_token": ADDED[1]}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return folder


def json_only_base(folder: Path) -> Path:
    """SentencePiece's kind of BPE in a directory without its `tokenizer.model`."""
    sentencepiece_base(folder)
    (folder / "tokenizer.model").unlink()
    return folder


KINDS = {
    "sentencepiece": sentencepiece_base,
    "byte_level": byte_level_base,
    "llama3": llama3_base,
    "json_only": json_only_base,
}
