"""Comparison of fireflyds' token ids with those of transformers' `AutoTokenizer` in the same directory."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fireflyds.types import Encoder

# Difficult inputs: all kinds of white space, code, digits, supplementary planes, combining marks, joined emoji.
HARD_LINES = (
    "def f(x):\n    return  x ** 2  # 注释\n\n\n\tif a:\n\t\tb = 1\r\n",
    "  two  leading, three   inside, and trailing  ",
    "\n\n \n\t\u00a0\u2003\u3000。",
    "1234567890 0.0001 2017年10月1日，１２３ＡＢＣ",
    "<tag attr='值'>文本</tag> {\"键\": [1, 2.5e-3]}",
    "𠀀𠮷𪚥 龘靐齉 㐀㐁 豈更車",
    "👩‍👩‍👧‍👦 🏳️‍🌈 é ñ ﷽ שלום привет こんにちは 안녕",
    "\n\n答案",
    "“引号”—破折号…《书名》「引文」（括号）、～",
)


@dataclass(frozen=True, slots=True)
class Difference:
    """How `AutoTokenizer` differs: the class that it takes, and what it gives otherwise."""

    tokenizer_class: str
    findings: tuple[str, ...]

    def __str__(self) -> str:
        return f"AutoTokenizer takes {self.tokenizer_class} there, which differs: {'; '.join(self.findings)}"


@dataclass(frozen=True, slots=True)
class AutoTokenizerIds:
    """`AutoTokenizer` of a directory. `tokens`: the texts of its added tokens, which it finds in any text."""

    tokenizer: Any
    tokens: tuple[str, ...]

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text, without special tokens."""
        return list(self.tokenizer.encode(text, add_special_tokens=False))


def load_auto_tokenizer(folder: Path) -> AutoTokenizerIds:
    """Loads the tokenizer of a directory with transformers, without code from the directory."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    return AutoTokenizerIds(tokenizer, tuple(tokenizer.get_added_vocab()))


def compare(
    folder: Path, encoder: Encoder, dialogues: Sequence[tuple[str, list[int]]] = (), lines: Iterable[str] = HARD_LINES
) -> Difference | None:
    """Compares the ids of `lines`, of rendered `dialogues` (text and ids), and the special tokens. None: all are equal.

    Lines that contain the text of an added token are left out: fireflyds encodes it as ordinary text on purpose.
    """
    try:
        auto = load_auto_tokenizer(folder)
    except (ValueError, OSError, KeyError, TypeError, ImportError, AttributeError) as error:
        return Difference("no class", (f"it cannot be loaded ({(str(error).splitlines() or [''])[0][:200]})",))
    findings = []
    texts = [line for line in lines if not any(token in line for token in auto.tokens)]
    different = [line for line in texts if auto.encode(line) != encoder.encode(line)]
    if different:
        findings.append(f"{len(different)} of {len(texts)} lines have other ids, the first {different[0][:40]!r}")
    different = [text for text, ids in dialogues if auto.encode(text) != ids]
    if different:
        findings.append(f"a dialogue has other ids: {different[0][:80]!r}")
    first = encoder.bos_id is not None and auto.tokenizer("a")["input_ids"][:1] == [encoder.bos_id]
    if first != (encoder.adds_bos and encoder.bos_id is not None):
        findings.append("it puts BOS before text" if first else "it puts no BOS before text")
    if auto.tokenizer.eos_token_id != encoder.eos_id:
        findings.append(f"eos_token_id is {auto.tokenizer.eos_token_id}, not {encoder.eos_id}")
    return Difference(type(auto.tokenizer).__name__, tuple(findings)) if findings else None
