"""Builds the index of a store: the kept documents of its parts, and counts of the dropped ones by reason."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from fireflyds.config import Duplicates, PrepareConfig
from fireflyds.data.clean.duplicates import banded, exact_duplicates, near_duplicates
from fireflyds.data.store.parts import EncodeTask
from fireflyds.types import Encoder

# Those of Chinese and English, Devanagari, Arabic and Urdu, Ethiopic, Burmese, Khmer, Tibetan, Armenian and Syriac.
_SENTENCE_ENDS = tuple("。！？!?…；.\n।॥؟۔።။។།։܀")


def sentence_ends(encoder: Encoder) -> np.ndarray:
    """Returns the ids of tokens whose text ends a sentence: int64, sorted."""
    ids = [
        index
        for index in range(encoder.vocab_size)
        if (text := encoder.token(index)) == "<0x0A>" or text.rstrip(" ”」』）)\"'").endswith(_SENTENCE_ENDS)
    ]
    return np.asarray(ids, np.int64)


def columns_of(
    config: PrepareConfig,
    tasks: list[EncodeTask],
    infos: list[dict[str, Any]],
    folder: Path,
    domains: list[str],
    languages: list[str],
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Returns the index columns of the kept documents, and by reason the sources of the dropped ones: int32 `[n]`."""
    parts = [np.load(folder / f"{info['key']}.npz") for info in infos]
    sizes = [len(part["length"]) for part in parts]

    def column(values: Iterable[Any], dtype: Any) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(np.asarray(value, dtype) for value in values)])

    def repeated(values: Iterable[int], dtype: Any) -> np.ndarray:
        return np.repeat(np.asarray(list(values), dtype), sizes)

    length = column((part["length"] for part in parts), np.int32)
    source = repeated((task.source for task in tasks), np.int32)
    keep, dropped = np.ones(len(length), bool), {}
    if config.clean.duplicates is not Duplicates.keep:
        copies = exact_duplicates(column((part["hashes"] for part in parts), np.uint64))
        if config.clean.duplicates is Duplicates.near:
            near = np.zeros(len(copies), bool)
            near[~copies] = _near_duplicates(config, parts, sizes, copies, folder)
            dropped["near-duplicate"] = source[near]
            keep &= ~near
        dropped["duplicate"] = source[copies]
        keep &= ~copies
    excess = _beyond_cap(config, source, keep)
    dropped["beyond max_documents"] = source[excess]
    keep[excess] = False
    sources = config.data.sources
    columns = {
        "part": repeated(range(len(tasks)), np.int32),
        "start": column((np.cumsum(part["length"], dtype=np.int64) - part["length"] for part in parts), np.int64),
        "length": length,
        "domain": repeated((domains.index(sources[task.source].domain) for task in tasks), np.uint16),
        "language": repeated((languages.index(sources[task.source].language) for task in tasks), np.uint16),
        "num_bytes": column((part["num_bytes"] for part in parts), np.int64),
        "rejected_start": column((part["rejected_start"] for part in parts), np.int32),
        "label": column((part["label"] for part in parts), np.int8),
    }
    columns = {name: values[keep] for name, values in columns.items()}
    return columns | _span_columns(parts, keep), dropped


def _near_duplicates(
    config: PrepareConfig, parts: list[Any], sizes: list[int], copies: np.ndarray, folder: Path
) -> np.ndarray:
    """True where a document that is no copy is similar to an earlier one. The signatures lie in a file meanwhile."""
    unique = np.split(~copies, np.cumsum(sizes)[:-1])
    file = folder / "signatures.npy"
    try:
        kept = (part["signatures"][rows] for part, rows in zip(parts, unique, strict=True))
        return near_duplicates(banded(kept, int((~copies).sum()), file), config.clean.similarity)
    finally:
        file.unlink(missing_ok=True)


def _span_columns(parts: list[Any], keep: np.ndarray) -> dict[str, np.ndarray]:
    """Returns the spans of the kept documents, their prompts, and the offsets of both."""
    counts = np.concatenate([part["span_counts"] for part in parts])
    kept_spans = np.repeat(keep, counts)
    prompt_lengths = np.concatenate([part["prompt_lengths"] for part in parts])
    prompts = np.concatenate([part["prompts"] for part in parts])
    return {
        "spans": np.concatenate([part["spans"] for part in parts])[kept_spans],
        "span_offsets": _offsets(counts[keep]),
        "prompt_heads": np.concatenate([part["prompt_heads"] for part in parts])[kept_spans],
        "prompt_tails": np.concatenate([part["prompt_tails"] for part in parts])[kept_spans],
        "prompts": prompts[np.repeat(kept_spans, prompt_lengths)],
        "prompt_offsets": _offsets(prompt_lengths[kept_spans]),
    }


def _offsets(counts: np.ndarray) -> np.ndarray:
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(counts, dtype=np.int64)])


def _beyond_cap(config: PrepareConfig, source: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """Returns the indices of documents beyond `max_documents` of their source; the kept ones are evenly spaced."""
    excess = [np.zeros(0, np.int64)]
    for number, settings in enumerate(config.data.sources):
        remaining = np.flatnonzero((source == number) & keep)
        if 0 < settings.max_documents < len(remaining):
            sampled = remaining[np.linspace(0, len(remaining) - 1, settings.max_documents).round().astype(np.int64)]
            excess.append(np.setdiff1d(remaining, sampled))
    return np.concatenate(excess)


def per_domain(
    config: PrepareConfig,
    tasks: list[EncodeTask],
    infos: list[dict[str, Any]],
    columns: dict[str, np.ndarray],
    lost: dict[str, np.ndarray],
    domains: list[str],
) -> dict[str, dict[str, Any]]:
    """Returns by domain the counts of rows read, kept, dropped and rejected, with the reasons."""
    result: dict[str, dict[str, Any]] = {}
    counts = np.diff(columns["span_offsets"])
    widths = columns["spans"][:, 1] - columns["spans"][:, 0]
    span_domains = np.repeat(columns["domain"], counts)
    for number, domain in enumerate(domains):
        domain_infos = [
            info for task, info in zip(tasks, infos, strict=True) if config.data.sources[task.source].domain == domain
        ]
        selected = columns["domain"] == number
        dropped, formats, unread, markers = (
            sum((Counter(info[name]) for info in domain_infos), Counter())
            for name in ("dropped", "formats", "unread", "markers")
        )
        for reason, sources in lost.items():
            dropped[reason] += sum(config.data.sources[source].domain == domain for source in sources.tolist())
        rejected = sum(len(info["rejected"]) for info in domain_infos)
        result[domain] = {
            "read": sum(info["counts"]["documents"] + sum(info["dropped"].values()) for info in domain_infos)
            + rejected,
            "documents": int(selected.sum()),
            "dialogues": int((counts[selected] > 0).sum()),
            "tokens": int(columns["length"][selected].sum(dtype=np.int64)),
            "bytes": int(columns["num_bytes"][selected].sum()),
            "learned": int(columns["length"][selected & (counts == 0)].sum(dtype=np.int64))
            + int(widths[span_domains == number].sum(dtype=np.int64)),
            "pairs": int(np.count_nonzero(columns["rejected_start"][selected])),
            "unknown": sum(info["unknown"] for info in domain_infos),
            "left_out_thoughts": sum(info["left_out_thoughts"] for info in domain_infos),
            "dropped": dropped.total(),
            "rejected": rejected,
            "reasons": {reason: count for reason, count in dropped.items() if count},
            "formats": dict(formats),
            "unread": {key: count for key, count in unread.items() if count > 0},
            "markers": dict(markers),
        }
    return result
