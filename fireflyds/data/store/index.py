"""The index of a store: which documents of its parts are kept, and what became of the others."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fireflyds.config import Duplicates, PrepareConfig
from fireflyds.data.clean.duplicates import exact_duplicates, near_duplicates
from fireflyds.data.store.parts import EncodeTask
from fireflyds.types import Encoder

_SENTENCE_ENDS = ("。", "！", "？", "!", "?", "…", "；", ".", "\n")


def sentence_ends(encoder: Encoder) -> np.ndarray:
    """The ids whose text ends a sentence: int64, sorted."""
    found = [
        index
        for index in range(encoder.vocab_size)
        if (text := encoder.token(index)) == "<0x0A>" or text.rstrip(" ”」』）)\"'").endswith(_SENTENCE_ENDS)
    ]
    return np.asarray(found, np.int64)


def columns_of(
    config: PrepareConfig,
    tasks: list[EncodeTask],
    infos: list[dict[str, Any]],
    folder: Path,
    domains: list[str],
    languages: list[str],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The index of the documents that stay, and by reason the sources of those that go: int64 `[dropped]`."""
    parts = [np.load(folder / f"{info['key']}.npz") for info in infos]
    sizes = [len(part["length"]) for part in parts]

    def column(values: Iterable[Any], dtype: Any) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(np.asarray(value, dtype) for value in values)])

    def repeated(values: Iterable[int], dtype: Any) -> np.ndarray:
        return np.repeat(np.asarray(list(values), dtype), sizes)

    length = column((part["length"] for part in parts), np.int32)
    source = repeated((task.source for task in tasks), np.int32)
    keep, lost = np.ones(len(length), bool), {}
    if config.clean.duplicates is not Duplicates.keep:
        copies = exact_duplicates(column((part["hashes"] for part in parts), np.uint64))
        if config.clean.duplicates is Duplicates.near:
            standing = np.flatnonzero(~copies)
            signatures = np.concatenate([part["signatures"] for part in parts])[standing]
            near = np.zeros(len(copies), bool)
            near[standing] = near_duplicates(signatures, config.clean.similarity)
            lost["near-duplicate"] = source[near]
            keep &= ~near
        lost["duplicate"] = source[copies]
        keep &= ~copies
    over = _beyond_cap(config, source, keep)
    lost["beyond max_documents"] = source[over]
    keep[over] = False
    counts = column((part["span_counts"] for part in parts), np.int32)
    spans = np.concatenate([np.zeros((0, 2), np.int32), *(part["spans"] for part in parts)])
    sources = config.data.sources
    columns = {
        "part": repeated(range(len(tasks)), np.int32),
        "start": column((np.cumsum(part["length"], dtype=np.int64) - part["length"] for part in parts), np.int64),
        "length": length,
        "domain": repeated((domains.index(sources[task.source].domain) for task in tasks), np.uint16),
        "language": repeated((languages.index(sources[task.source].language) for task in tasks), np.uint16),
        "num_bytes": column((part["num_bytes"] for part in parts), np.int64),
    }
    if not keep.all():
        columns = {name: values[keep] for name, values in columns.items()}
        spans, counts = spans[np.repeat(keep, counts)], counts[keep]
    columns["spans"] = spans
    columns["span_offsets"] = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])
    return columns, lost


def _beyond_cap(config: PrepareConfig, source: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Documents above a source's `max_documents`, drawn evenly from it: indices."""
    over = [np.zeros(0, np.int64)]
    for number, settings in enumerate(config.data.sources):
        standing = np.flatnonzero((source == number) & keep)
        if 0 < settings.max_documents < len(standing):
            kept = standing[np.linspace(0, len(standing) - 1, settings.max_documents).round().astype(np.int64)]
            over.append(np.setdiff1d(standing, kept))
    return np.concatenate(over)


def per_domain(
    config: PrepareConfig,
    tasks: list[EncodeTask],
    infos: list[dict[str, Any]],
    columns: dict[str, np.ndarray],
    lost: dict[str, np.ndarray],
    domains: list[str],
) -> dict[str, dict[str, Any]]:
    """What was read, kept and dropped, and why."""
    found: dict[str, dict[str, Any]] = {}
    counts = np.diff(columns["span_offsets"])
    widths = columns["spans"][:, 1] - columns["spans"][:, 0]
    of_span = np.repeat(columns["domain"], counts)
    for number, domain in enumerate(domains):
        mine = [
            info for task, info in zip(tasks, infos, strict=True) if config.data.sources[task.source].domain == domain
        ]
        chosen = columns["domain"] == number
        dropped: Counter[str] = Counter()
        formats: Counter[str] = Counter()
        for info in mine:
            dropped.update(info["dropped"])
            formats.update(info["formats"])
        for reason, sources in lost.items():
            dropped[reason] += sum(config.data.sources[source].domain == domain for source in sources.tolist())
        rejected = sum(len(info["rejected"]) for info in mine)
        found[domain] = {
            "read": sum(info["counts"]["documents"] + sum(info["dropped"].values()) for info in mine) + rejected,
            "documents": int(chosen.sum()),
            "dialogues": int((counts[chosen] > 0).sum()),
            "tokens": int(columns["length"][chosen].sum(dtype=np.int64)),
            "bytes": int(columns["num_bytes"][chosen].sum()),
            "learned": int(columns["length"][chosen & (counts == 0)].sum(dtype=np.int64))
            + int(widths[of_span == number].sum(dtype=np.int64)),
            "dropped": dropped.total(),
            "rejected": rejected,
            "reasons": {reason: count for reason, count in dropped.items() if count},
            "formats": dict(formats),
        }
    return found
