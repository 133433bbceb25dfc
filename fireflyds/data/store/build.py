"""From the sources of a configuration to a whole token store."""

import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fireflyds.config import PrepareConfig
from fireflyds.data.store.index import columns_of, per_domain, sentence_ends
from fireflyds.data.store.parts import EncodeTask, WorkerContext, finished_part, init_worker, make_part, start_worker
from fireflyds.data.store.store import MANIFEST, VERSION, token_dtype
from fireflyds.errors import UserError
from fireflyds.types import Encoder

_FILES = (".ids", ".npz", ".json")


def store_provenance(config: PrepareConfig, tokenizer: str, tasks: list[EncodeTask]) -> dict[str, Any]:
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
        "weights": config.data.shares,
        "parts": [task.key for task in tasks],
    }


def make_parts(
    config: PrepareConfig, tasks: list[EncodeTask], load_encoder: Callable[[], Encoder], folder: Path, earlier: Path
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
    workshop = WorkerContext(load_encoder, config.data.sources, config.template, config.loss_on, config.clean, folder)
    started, done = time.perf_counter(), 0
    told = started
    for task, info in _made(missing, workshop, config.workers or os.cpu_count() or 1):
        found[task.key] = info
        done += task.size
        if time.perf_counter() - told > 10:
            told = time.perf_counter()
            print(f"{len(found):,} of {len(tasks):,} parts, {done / (told - started) / 1e6:.1f} MB/s", flush=True)
    return [found[task.key] for task in tasks]


def _made(
    tasks: list[EncodeTask], workshop: WorkerContext, workers: int
) -> Iterator[tuple[EncodeTask, dict[str, Any]]]:
    if workers == 1 or len(tasks) == 1:
        init_worker(workshop)
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


def finish_store(
    config: PrepareConfig,
    tasks: list[EncodeTask],
    infos: list[dict[str, Any]],
    encoder: Encoder,
    out: Path,
    made_from: dict[str, Any],
) -> dict[str, Any]:
    """Index and manifest over the parts in `out/parts`. Returns the manifest.

    Raises:
        UserError: too many rows were rejected, or no document could be used.
    """
    rejected = [
        {
            "file": task.part.file,
            "line": row["line"] and row["line"] + task.part.first_line - 1,
            "reason": row["reason"],
        }
        for task, info in zip(tasks, infos, strict=True)
        for row in info["rejected"]
    ]
    refuse_rejected(config, tasks, infos, rejected)
    with (out / "rejected.jsonl").open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rejected)
    domains = list(dict.fromkeys(source.domain for source in config.data.sources))
    languages = list(dict.fromkeys(source.language for source in config.data.sources))
    columns, lost = columns_of(config, tasks, infos, out / "parts", domains, languages)
    (out / "index").mkdir(exist_ok=True)
    for name, column in columns.items():
        np.save(out / "index" / f"{name}.npy", column)
    np.save(out / "index" / "sentence_ends.npy", sentence_ends(encoder))
    domain_counts = per_domain(config, tasks, infos, columns, lost, domains)
    totals: Counter[str] = Counter()
    for counts in domain_counts.values():
        totals.update({name: count for name, count in counts.items() if isinstance(count, int)})
    wanted = {task.key for task in tasks}
    for path in list((out / "parts").iterdir()):
        if path.name.split(".")[0] not in wanted:
            path.unlink()
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
        "per_domain": domain_counts,
        "parts": [{"key": info["key"], "tokens": info["counts"]["tokens"]} for info in infos],
    }
    (out / MANIFEST).write_text(json.dumps(manifest, ensure_ascii=False, indent=2), encoding="utf-8")
    return manifest


def refuse_rejected(
    config: PrepareConfig, tasks: list[EncodeTask], infos: list[dict[str, Any]], rejected: list[dict[str, Any]]
) -> None:
    """Raises `UserError` when nothing can be used, or more than `max_rejected` cannot be read.

    What stood in a file that breaks off is not known in rows, so such files are weighed by their bytes.
    """
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
    broken = [task for task, info in zip(tasks, infos, strict=True) if any(not row["line"] for row in info["rejected"])]
    size = sum(task.size for task in broken)
    if size > config.max_rejected * sum(task.size for task in tasks):
        reason = next(row["reason"] for row in rejected if not row["line"])
        raise UserError(
            f"max_rejected={config.max_rejected}: {len(broken):,} files of {size:,} bytes cannot be read to their end, the first "
            f"{broken[0].part.file} ({reason}). Get them again, or raise the limit; what is encoded already is kept"
        )
    rows = documents + dropped.total() + len(rejected)
    if len(rejected) > config.max_rejected * rows:
        reasons = Counter(row["reason"].split(":")[0] for row in rejected)
        shown = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(3))
        raise UserError(
            f"max_rejected={config.max_rejected}: {len(rejected):,} of {rows:,} rows cannot be used ({shown}); the first: {first}. "
            "Mend the files, or raise the limit; what is encoded already is kept"
        )
