"""The tokenizer of a checkpoint in its maker's layout, without the code that comes with it."""

import json
import shutil
from pathlib import Path
from typing import Any

from fireflyds.fs import read_json
from fireflyds.tokenizer.encoder import holds_ranks
from fireflyds.tokenizer.hf_files import FILES, copy_tokenizer
from fireflyds.tokenizer.tiktoken_ranks import fast_tokenizer

_QWEN = "qwen.tiktoken"
# Words of the ranks' vocabularies: Qwen cuts every digit, Llama 3 up to three.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", *(f"<|extra_{number}|>" for number in range(205)))
_LLAMA3_SPECIAL = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>", "<|step_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|eom_id|>",
    "<|eot_id|>", "<|python_tag|>", *(f"<|reserved_special_token_{number}|>" for number in range(2, 247)),
)  # fmt: skip
# Behind the pieces of ChatGLM's `tokenizer.model`; the last four are ChatGLM3's.
_CHATGLM_SPECIAL = (
    "[MASK]", "[gMASK]", "[sMASK]", "sop", "eop", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>",
)  # fmt: skip


def write_tokenizer_of(folder: Path, out: Path, kind: str) -> bool:
    """Writes the tokenizer of a checkpoint of `kind` to `out`, where its `config.json` stands. False: there is none.

    Raises:
        UserError: transformers would give other ids than the files.
    """
    source = out / "source-tokenizer"
    source.mkdir()
    try:
        for name in FILES:
            if (folder / name).is_file():
                shutil.copy2(folder / name, source)
        ranks = folder / _QWEN if kind == "qwen" else folder / "tokenizer.model"
        if (kind == "qwen" or holds_ranks(ranks)) and ranks.is_file() and not (source / "tokenizer.json").is_file():
            (source / "tokenizer.model").unlink(missing_ok=True)
            _write_ranks(ranks, source, qwen=kind == "qwen")
        elif kind == "chatglm" and (source / "tokenizer.model").is_file():
            _add_chatglm_tokens(source)
        if not any((source / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
            return False
        _forget_code(source / "tokenizer_config.json")
        copy_tokenizer(source, out)
    finally:
        shutil.rmtree(source)
    return True


def _write_ranks(ranks: Path, out: Path, *, qwen: bool) -> None:
    special = _QWEN_SPECIAL if qwen else _LLAMA3_SPECIAL
    document = fast_tokenizer(ranks, _WORDS.format(digits="" if qwen else "{1,3}"), special)
    if qwen:
        document["normalizer"] = {"type": "NFC"}
        settings: dict[str, Any] = {"eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"}
    else:
        settings = {"bos_token": special[0], "eos_token": special[1], "pad_token": special[1], "add_bos_token": True}
        bos = {"id": special[0], "type_id": 0}
        single = [{"SpecialToken": bos}, {"Sequence": {"id": "A", "type_id": 0}}]
        number = next(row["id"] for row in document["added_tokens"] if row["content"] == special[0])
        document["post_processor"] = {
            "type": "TemplateProcessing", "single": single,
            "pair": [*single, {"SpecialToken": bos | {"type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {special[0]: {"id": special[0], "ids": [number], "tokens": [special[0]]}},
        }  # fmt: skip
    (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    (out / "tokenizer_config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")


def _add_chatglm_tokens(source: Path) -> None:
    """Names the tokens that ChatGLM's own code adds behind the pieces."""
    from sentencepiece import SentencePieceProcessor

    first = SentencePieceProcessor(model_file=str(source / "tokenizer.model")).get_piece_size()
    file = source / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    row: dict[str, Any] = {"lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
    settings["added_tokens_decoder"] = {
        str(first + number): {"content": content} | row for number, content in enumerate(_CHATGLM_SPECIAL)
    }
    settings |= {"add_bos_token": False, "eos_token": "</s>", "pad_token": "<unk>", "unk_token": "<unk>"}
    file.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")


def _forget_code(file: Path) -> None:
    """Removes the names of classes whose code came with the checkpoint."""
    if not file.is_file():
        return
    settings = read_json(file)
    if settings.pop("auto_map", None) is not None:
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    file.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
