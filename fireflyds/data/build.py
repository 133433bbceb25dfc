"""From the sources of a configuration to a whole token store."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fireflyds.config import Duplicates, PrepareConfig
from fireflyds.data.duplicates import exact_duplicates, near_duplicates
from fireflyds.data.parts import Task, Workshop, finished_part, make_part, open_workshop, start_worker
from fireflyds.data.store import MANIFEST, VERSION, token_dtype
from fireflyds.errors import UserError
from fireflyds.types import Encoder

_SENTENCE_ENDS = ("。", "！", "？", "!", "?", "…", "；", ".", "\n")
_FILES = (".ids", ".npz", ".json")


def provenance(config: PrepareConfig, tokenizer: str, tasks: list[Task]) -> dict[str, Any]:
    """What a store is made from; equal for two stores with equal contents. `tokenizer` is its fingerprint."""
    sources = [
        {name: value if isinstance(value, str | int | float) else value.name for name, value in asdict(source).items()}
        for source in config.data.sources
    ]
    clean = {name: str(value) for name, value in asdict(config.clean).items()}
    return {
        "tokenizer": tokenizer,
        "template": config.template,
        "loss_on": config.loss_on.name,
        "clean": clean,
        "sources": sources,
        "parts": [task.key for task in tasks],
    }


def make_parts(
    config: PrepareConfig, tasks: list[Task], load_encoder: Callable[[], Encoder], folder: Path, earlier: Path
) -> list[dict[str, Any]]:
    """Every part into `folder`, in order; those that stand there or in the `earlier` folder are used again."""
    folder.mkdir(parents=True, exist_ok=True)
    found: dict[str, dict[str, Any]] = {}
    for task in tasks:
        for place in (folder, earlier):
            info = finished_part(place, task, config.template, config.loss_on)
            if info is not None and task.key not in found:
                found[task.key] = info
                if place is not folder:
                    _link(place, folder, task.key)
    missing = list({task.key: task for task in tasks if task.key not in found}.values())
    if found:
        print(f"{len(tasks) - len(missing):,} of {len(tasks):,} parts stand already", flush=True)
    workshop = Workshop(load_encoder, config.data.sources, config.template, config.loss_on, config.clean, folder)
    started, done = time.perf_counter(), 0
    told = started
    for task, info in _made(missing, workshop, config.workers or os.cpu_count() or 1):
        found[task.key] = info
        done += task.size
        if time.perf_counter() - told > 10:
            told = time.perf_counter()
            print(f"{len(found):,} of {len(tasks):,} parts, {done / (told - started) / 1e6:.1f} MB/s", flush=True)
    return [found[task.key] for task in tasks]


def _made(tasks: list[Task], workshop: Workshop, workers: int) -> Iterator[tuple[Task, dict[str, Any]]]:
    if workers == 1 or len(tasks) == 1:
        open_workshop(workshop)
        yield from ((task, make_part(task)) for task in tasks)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(workshop,)) as pool:
        try:
            yield from zip(tasks, pool.map(make_part, tasks), strict=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _link(source: Path, target: Path, key: str) -> None:
    for suffix in _FILES:
        file = target / f"{key}{suffix}"
        file.unlink(missing_ok=True)
        os.link(source / f"{key}{suffix}", file)


def finish(
    config: PrepareConfig,
    tasks: list[Task],
    infos: list[dict[str, Any]],
    encoder: Encoder,
    out: Path,
    made_from: dict[str, Any],
) -> dict[str, Any]:
    """Index and manifest over the parts in `out/parts`. Returns the manifest.

    Raises:
        UserError: too many rows were rejected, or no document could be used.
    """
    rejected = [row for info in infos for row in info["rejected"]]
    refuse_rejected(config, infos, rejected)
    with (out / "rejected.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
    domains = list(dict.fromkeys(source.domain for source in config.data.sources))
    languages = list(dict.fromkeys(source.language for source in config.data.sources))
    columns, lost = _columns(config, tasks, infos, out / "parts", domains, languages)
    (out / "index").mkdir(exist_ok=True)
    for name, column in columns.items():
        np.save(out / "index" / f"{name}.npy", column)
    np.save(out / "index" / "sentence_ends.npy", sentence_ends(encoder))
    per_domain = _per_domain(config, tasks, infos, columns, lost, domains)
    totals: Counter[str] = Counter()
    for counts in per_domain.values():
        totals.update({name: count for name, count in counts.items() if isinstance(count, int)})
    for name in [path.name for path in (out / "parts").iterdir()]:
        if name.split(".")[0] not in {task.key for task in tasks}:
            (out / "parts" / name).unlink()
    manifest = {
        "version": VERSION,
        "dtype": token_dtype(encoder.vocab_size).name,
        "domains": domains,
        "languages": languages,
        # Only a store with dialogues in it speaks a template, which the export then writes.
        "template": config.template if totals["dialogues"] else None,
        "weights": config.data.shares,
        "made_from": made_from,
        "totals": dict(totals),
        "per_domain": per_domain,
        "parts": [{"key": info["key"], "tokens": info["counts"]["tokens"]} for info in infos],
    }
    (out / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=2), encoding="utf-8")
    return manifest


def refuse_rejected(config: PrepareConfig, infos: Iterable[dict[str, Any]], rejected: list[dict[str, Any]]) -> None:
    """Raises `UserError` when nothing can be used, or more than `max_rejected` cannot be read."""
    documents = sum(info["counts"]["documents"] for info in infos)
    dropped: Counter[str] = Counter()
    for info in infos:
        dropped.update(info["dropped"])
    first = json.dumps(rejected[0], ensure_ascii=False) if rejected else ""
    if not documents:
        why = (
            f"; the first rejected row: {first}"
            if first
            else f"; dropped: {dropped.most_common(1)[0][0]}"
            if dropped
            else ""
        )
        raise UserError(f"{config.data.sources[0].path}: no document could be used{why}")
    rows = documents + dropped.total() + len(rejected)
    if len(rejected) > config.max_rejected * rows:
        reasons = Counter(row["reason"].split(":")[0] for row in rejected)
        shown = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(3))
        raise UserError(
            f"max_rejected={config.max_rejected}: {len(rejected):,} of {rows:,} rows cannot be used ({shown}); the first: {first}. "
            "Mend the files, or raise the limit; what is encoded already is kept"
        )


def sentence_ends(encoder: Encoder) -> np.ndarray:
    """The ids whose text ends a sentence: int64, sorted."""
    found = [
        index
        for index in range(encoder.vocab_size)
        if (text := encoder.token(index)) == "<0x0A>" or text.rstrip(" ”」』）)\"'").endswith(_SENTENCE_ENDS)
    ]
    return np.asarray(found, np.int64)


def _columns(
    config: PrepareConfig,
    tasks: list[Task],
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


def _per_domain(
    config: PrepareConfig,
    tasks: list[Task],
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
