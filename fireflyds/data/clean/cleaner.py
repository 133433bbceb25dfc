"""Cleans documents in steps; dropped documents are counted under the name of the step."""

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np

from fireflyds.config import CleanConfig, UnicodeForm
from fireflyds.data.read.files import find_files, read_records
from fireflyds.data.read.records import RawRecord
from fireflyds.errors import UserError
from fireflyds.types import Sample

# Full-width letters, digits and space to ASCII; full-width punctuation is regular Chinese and is kept.
_WIDTH = {code: code - 0xFEE0 for code in (*range(0xFF10, 0xFF1A), *range(0xFF21, 0xFF3B), *range(0xFF41, 0xFF5B))}
_WIDTH[0x3000] = 0x20
# Navigation, copyright and similar lines of web pages.
_BOILERPLATE = re.compile(
    r"^\s*(首页|上一[页篇]|下一[页篇]|返回(顶部|首页|列表)|登录|注册|分享到[:：].{0,30}|责任编辑[:：].{0,20}|编辑[:：]\S{1,8}|"
    r"来源[:：]\S{1,30}|"
    r"版权(所有|声明).{0,60}|未经.{0,12}(授权|许可).{0,8}(转载|使用).{0,30}|"
    r".{0,30}(ICP备|公网安备).{0,30}|点击(查看|进入|这里).{0,20}|"
    r"扫(码|一扫).{0,20}|关注.{0,12}(公众号|微信).{0,20}|"
    r"(copyright\s*)?(©|\(c\)|copyright\s+\d{4}).{0,60}|all rights reserved.{0,20}|"
    r"(click|tap) here.{0,30}|share (this|on) .{0,30}|(accept|we use) cookies.{0,60}|"
    r"subscribe to .{0,30}|sign (in|up)|log ?in)\s*$",
    re.IGNORECASE,
)
_RUN_LENGTH = 10
_PUNCTUATION_AND_SPACE = re.compile(r"[\W_]+")


class Cleaner:
    """Applies the configured cleaning steps to samples; steps that modify text run before steps that drop samples."""

    def __init__(self, config: CleanConfig) -> None:
        self._config = config
        self._text_changes = _text_changes(config)
        self._is_noop = config == CleanConfig(duplicates=config.duplicates, similarity=config.similarity)
        self._contamination = np.sort(contamination(config)) if config.decontaminate else None

    def clean(self, sample: Sample) -> Sample | str:
        """Returns the cleaned sample, or the name of the step that dropped it. Dialogues are modified, and dropped
        only if they are contaminated."""
        if self._is_noop:
            return sample
        if self._text_changes:
            change = self._apply_changes
            sample = replace(
                sample,
                text=None if sample.text is None else change(sample.text),
                messages=tuple(
                    replace(m, content=change(m.content), reasoning=change(m.reasoning)) for m in sample.messages
                ),
            )
        if sample.text is not None:
            result = self._filter_document(sample.text)
            if not isinstance(result, Sample):
                return result
            sample = result
        if self._contamination is not None:
            text = sample.text if sample.text is not None else "\n".join(m.content for m in sample.messages)
            if contaminated(text, self._contamination, self._config.overlap):
                return "contaminated"
        return sample

    def _apply_changes(self, text: str) -> str:
        for change in self._text_changes:
            text = change(text)
        return text

    def _filter_document(self, text: str) -> Sample | str:
        """Returns the document without boilerplate lines, or the name of the step that dropped it."""
        if self._config.boilerplate:
            text = "\n".join(line for line in text.split("\n") if not _BOILERPLATE.match(line))
            if not text.strip():
                return "boilerplate"
        if len(text) < self._config.min_characters:
            return "too short"
        if self._config.max_repetition < 1 and repetition(text) > self._config.max_repetition:
            return "repetition"
        return Sample(text=text)


def _text_changes(config: CleanConfig) -> list[Callable[[str], str]]:
    changes: list[Callable[[str], str]] = []
    if config.unicode is not UnicodeForm.none:
        form: Any = config.unicode.name.upper()
        changes.append(lambda text: unicodedata.normalize(form, text))
    if config.width:
        changes.append(lambda text: text.translate(_WIDTH))
    if config.simplify:
        changes.append(_simplifier())
    return changes


@cache
def _simplifier() -> Callable[[str], str]:
    try:
        import opencc
    except ImportError as error:
        raise UserError(
            "needs OpenCC", key="clean.simplify", value="true", remedy="Install it with pip install 'fireflyds[clean]'"
        ) from error
    convert: Callable[[str], str] = opencc.OpenCC("t2s").convert
    return convert


def repetition(text: str) -> float:
    """Returns the larger of two shares: characters in repeated lines, and repeated runs of ten characters."""
    lines = [line for line in text.split("\n") if line.strip()]
    repeated = sum(len(line) * (count - 1) for line, count in Counter(lines).items())
    by_lines = repeated / max(1, sum(map(len, lines)))
    runs = [text[start : start + _RUN_LENGTH] for start in range(0, max(0, len(text) - _RUN_LENGTH), 3)]
    return max(by_lines, 1 - len(set(runs)) / len(runs) if len(runs) >= _RUN_LENGTH else 0.0)


def run_hashes(text: str, length: int) -> np.ndarray:
    """Returns hashes of all runs of `length` characters, ignoring white space and punctuation: uint64 `[n]`."""
    codes = np.array([ord(c) for c in _PUNCTUATION_AND_SPACE.sub("", text.lower())], np.uint64)
    if len(codes) < length:
        return np.zeros(0, np.uint64)
    # Polynomial hash modulo 2^64 of mixed character codes, so that short runs rarely collide.
    mixed = (codes + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    mixed ^= mixed >> np.uint64(29)
    powers = np.uint64(0xD1342543DE82EF95) ** np.arange(length, dtype=np.uint64)
    windows = np.lib.stride_tricks.sliding_window_view(mixed, length)
    hashes: np.ndarray = (windows * powers).sum(axis=1, dtype=np.uint64)
    return hashes


def contamination(config: CleanConfig) -> np.ndarray:
    """Returns the unique run hashes of all evaluation sets, sorted: uint64 `[n]`."""
    all_hashes = []
    for path in config.decontaminate:
        hashes = [run_hashes(text, config.overlap) for text in _evaluation_texts(path)]
        if not sum(map(len, hashes)):
            raise UserError(
                f"{path} has no text of clean.overlap={config.overlap} characters, so no contamination can be detected",
                key="clean.decontaminate",
                remedy="Give a readable file, or a smaller clean.overlap",
            )
        all_hashes += hashes
    return np.unique(np.concatenate(all_hashes)) if all_hashes else np.zeros(0, np.uint64)


def _evaluation_texts(path: str) -> Iterable[str]:
    """Yields every string in the rows of an evaluation set, whatever their layout."""
    for file in find_files(path):
        for record in read_records(file):
            if not isinstance(record, RawRecord):
                raise UserError(
                    f"line {record.line} cannot be read ({record.reason}), so its text could not be found in the data",
                    key="clean.decontaminate",
                    value=file,
                    remedy="Correct the file",
                )
            yield from _strings(record.fields)


def _strings(value: Any) -> Iterable[str]:
    """Yields all strings in nested dicts and lists."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, list):
        for item in value:
            yield from _strings(item)


def contaminated(text: str, evaluation: np.ndarray, length: int) -> bool:
    """True where a run of `length` characters of the text has a hash in `evaluation` (sorted, uint64 `[n]`)."""
    if len(evaluation) == 0:
        return False
    hashes = run_hashes(text, length)
    indices = np.minimum(np.searchsorted(evaluation, hashes), len(evaluation) - 1)
    return bool((evaluation[indices] == hashes).any())
