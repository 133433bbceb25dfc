"""Ranks of tiktoken as a `tokenizer.json`: Qwen's first files (`qwen.tiktoken`) and Meta's of Llama 3."""

import base64
import binascii
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fireflyds.errors import UserError
from fireflyds.tokenizer.byte_level import byte_values


def fast_tokenizer(file: Path, pattern: str, special: Sequence[str]) -> dict[str, Any]:
    """Returns the contents of a `tokenizer.json` that gives tiktoken's ids.

    A rank is an id. Of all neighbours that make up a token those are merged first whose token has the lowest rank, so
    every pair of tokens that makes up another is a merge, in the order of the ranks.

    Args:
        file: a token in base64 and its rank on every line.
        pattern: the expression of words, within which text is merged.
        special: special tokens, which follow the ranks.

    Raises:
        UserError: a line is something else, or ranks are not 0, 1, 2, ...
    """
    ranks = _read(file)
    names = {byte: character for character, byte in byte_values().items()}

    def spelled(token: bytes) -> str:
        return "".join(names[byte] for byte in token)

    merges = [pair for token in ranks for pair in _merges(token, ranks)]
    added = [
        {"id": len(ranks) + number, "content": content, "single_word": False, "lstrip": False, "rstrip": False}
        | {"normalized": False, "special": True}
        for number, content in enumerate(special)
    ]
    words = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [words, level]},
        "post_processor": None, "decoder": level,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
            "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": True,
            "vocab": {spelled(token): rank for token, rank in ranks.items()},
            "merges": [[spelled(first), spelled(second)] for first, second in merges],
        },
    }  # fmt: skip


def _read(file: Path) -> dict[bytes, int]:
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if not line:
            continue
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error) as error:
            raise UserError(
                f"line {number} is not a token in base64 and its rank", key=file, remedy="Get the file again"
            ) from error
    if sorted(ranks.values()) != [*range(len(ranks))] or any(bytes([byte]) not in ranks for byte in range(256)):
        raise UserError("ranks or single bytes are missing", key=file, remedy="Get the file again")
    return dict(sorted(ranks.items(), key=lambda item: item[1]))


def _merges(token: bytes, ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """All pairs of tokens that make up a token, those of low ranks first."""
    pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
    known = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
    return sorted(known, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))
