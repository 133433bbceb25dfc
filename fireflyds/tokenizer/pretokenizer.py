r"""Pre-tokenizers of `tokenizer.json`: where text is cut before merges, and combining marks kept inside words.

Llama-3's and Qwen's expressions take words as `\p{L}+`, which cuts at every vowel sign of Thai, Hindi, Burmese or
Khmer and at every vowel mark of Arabic: no piece can cross such a cut. Qwen3.5's take `[\p{L}\p{M}]+`.
"""

import json
from typing import Any

import regex

# GPT-2's expression, which `ByteLevel` applies where it has none of its own.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_MARK = regex.compile(r"\p{M}")


def has_marks(text: str) -> bool:
    """True where the text has a combining mark."""
    return _MARK.search(text) is not None


def with_marks(document: dict[str, Any]) -> dict[str, Any] | None:
    r"""Returns the contents of a `tokenizer.json` whose words include combining marks; None where no expression of its
    pre-tokenizer takes words as `\p{L}+`. Text without marks is cut as before."""
    step = document.get("pre_tokenizer")
    changed = _changed(step)
    return None if changed == step else document | {"pre_tokenizer": changed}


def _changed(step: Any) -> Any:
    if not isinstance(step, dict):
        return step
    if step.get("type") == "Sequence":
        return step | {"pretokenizers": [_changed(part) for part in step["pretokenizers"]]}
    if step.get("type") == "Split" and "Regex" in (step.get("pattern") or {}):
        return step | {"pattern": {"Regex": _expression(step["pattern"]["Regex"])}}
    if step.get("type") == "ByteLevel" and step.get("use_regex", True):
        split = {"type": "Split", "pattern": {"Regex": _expression(_GPT2)}, "behavior": "Isolated", "invert": False}
        return {"type": "Sequence", "pretokenizers": [split, step | {"use_regex": False}]}
    return step


def _expression(expression: str) -> str:
    """Words take marks, and what is neither space, letter nor number takes none."""
    expression = regex.sub(r"(?<!\[)(?<!\[\^)\\p\{L\}\+", r"[\\p{L}\\p{M}]+", expression)
    return expression.replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")


def num_cut_words(document: dict[str, Any], words: list[str]) -> int:
    """Returns how many of the words with combining marks the pre-tokenizer of a `tokenizer.json` cuts."""
    from tokenizers import Tokenizer

    cutter = Tokenizer.from_str(json.dumps(document)).pre_tokenizer
    if cutter is None:
        return 0
    return sum(len(cutter.pre_tokenize_str(word)) > 1 for word in words if has_marks(word))
