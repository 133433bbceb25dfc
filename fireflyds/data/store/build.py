"""Builds a token store from the sources of a configuration."""

import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from fireflyds.config import PrepareConfig
from fireflyds.data.chat_template import template_key
from fireflyds.data.store.index import columns_of, per_domain, sentence_ends
from fireflyds.data.store.parts import EncodeTask, WorkerContext, finished_part, init_worker, make_part, start_worker
from fireflyds.data.store.shared_work import SharedPlace, deal
from fireflyds.data.store.store import MANIFEST, VERSION, token_dtype
from fireflyds.errors import UserError
from fireflyds.progress import Progress
from fireflyds.types import Encoder

_FILES = (".ids", ".npz", ".json")


def store_provenance(config: PrepareConfig, encoder: Encoder, tasks: list[EncodeTask]) -> dict[str, Any]:
    """Returns the provenance of a store; equal for two stores with equal contents."""
    sources = [
        {name: value if isinstance(value, str | int | float) else value.name for name, value in asdict(source).items()}
        for source in config.data.sources
    ]
    clean = {name: str(value) for name, value in asdict(config.clean).items()}
    return {
        "tokenizer": encoder.fingerprint(),
        "template": template_key(encoder, config.template),
        "loss_on": config.loss_on.name,
        "learn_roles": [role.name for role in config.learn_roles],
        "learn_reasoning": config.learn_reasoning,
        "context_turns": config.context_turns,
        "preference": config.preference.name,
        "clean": clean,
        "sources": sources,
        "weights": config.data.shares,
        "parts": [task.key for task in tasks],
    }


def dialogue_settings(made_from: dict[str, Any]) -> str:
    """Returns the settings of a store's provenance that the encoding of dialogues depends on."""
    return " ".join(
        str(made_from[name])
        for name in ("template", "loss_on", "learn_roles", "learn_reasoning", "context_turns", "preference")
    )


def make_parts(
    config: PrepareConfig,
    tasks: list[EncodeTask],
    load_encoder: Callable[[], Encoder],
    folder: Path,
    earlier: Path,
    made_from: dict[str, Any],
) -> list[dict[str, Any]]:
    """Encodes all parts into `folder`; complete parts in `folder` or `earlier` are reused. Returns the counts.

    `made_from`: the provenance of the store, with the settings of dialogues.
    """
    finished, missing = reuse_parts(tasks, folder, earlier, made_from)
    context = WorkerContext(load_encoder, config, dialogue_settings(made_from), folder)
    with Progress("prepare", sum(task.size for task in missing)) as progress:
        for task, info in _encode_parts(missing, context, config.workers or os.cpu_count() or 1):
            finished[task.key] = info
            progress.advance(task.size, info["counts"]["documents"])
    return [finished[task.key] for task in tasks]


def reuse_parts(
    tasks: list[EncodeTask], folder: Path, earlier: Path, made_from: dict[str, Any]
) -> tuple[dict[str, dict[str, Any]], list[EncodeTask]]:
    """Returns the counts of the complete parts, which then all lie in `folder`, and the parts to encode."""
    dialogues = dialogue_settings(made_from)
    folder.mkdir(parents=True, exist_ok=True)
    finished: dict[str, dict[str, Any]] = {}
    for task in tasks:
        for source in (folder, earlier):
            info = finished_part(source, task, dialogues)
            if info is not None and task.key not in finished:
                finished[task.key] = info
                if source is not folder:
                    _link(source, folder, task.key)
    missing = list({task.key: task for task in tasks if task.key not in finished}.values())
    for task in missing:  # a damaged or outdated part must not count as finished
        (folder / f"{task.key}.json").unlink(missing_ok=True)
    if finished:
        print(f"{len(tasks) - len(missing):,} of {len(tasks):,} parts are reused", flush=True)
    return finished, missing


def make_shared_parts(
    config: PrepareConfig,
    tasks: list[EncodeTask],
    load_encoder: Callable[[], Encoder],
    folder: Path,
    made_from: dict[str, Any],
    place: SharedPlace,
) -> None:
    """As `make_parts`, with the processes of other machines that share `folder`; ends when all parts are finished,
    whoever made them."""
    context = WorkerContext(load_encoder, config, dialogue_settings(made_from), folder)
    by_key = {task.key: task for task in tasks}
    workers = config.workers or os.cpu_count() or 1
    running: dict[Future[dict[str, Any]], str] = {}
    with (
        Progress(f"prepare, process {place.rank + 1} of {place.size}") as progress,
        ProcessPoolExecutor(workers, initializer=start_worker, initargs=(context,)) as pool,
    ):

        def collect(at_most: int) -> None:
            while len(running) > at_most:
                done, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in done:
                    key = running.pop(future)
                    info = future.result()
                    place.claims.release(key)
                    progress.advance(by_key[key].size, info["counts"]["documents"])

        for key in deal(place, folder, by_key):
            if key is None:
                collect(0)
            else:
                running[pool.submit(make_part, by_key[key])] = key
                collect(2 * workers)
        collect(0)


def _encode_parts(
    tasks: list[EncodeTask], context: WorkerContext, workers: int
) -> Iterator[tuple[EncodeTask, dict[str, Any]]]:
    if workers == 1 or len(tasks) == 1:
        init_worker(context)
        yield from ((task, make_part(task)) for task in tasks)
        return
    with ProcessPoolExecutor(workers, initializer=start_worker, initargs=(context,)) as pool:
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
    """Writes the index and the manifest of the parts in `out/parts`. Returns the manifest.

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
    columns, dropped = columns_of(config, tasks, infos, out / "parts", domains, languages)
    (out / "index").mkdir(exist_ok=True)
    for name, column in columns.items():
        np.save(out / "index" / f"{name}.npy", column)
    np.save(out / "index" / "sentence_ends.npy", sentence_ends(encoder))
    domain_counts = per_domain(config, tasks, infos, columns, dropped, domains)
    totals: Counter[str] = Counter()
    for counts in domain_counts.values():
        totals.update({name: count for name, count in counts.items() if isinstance(count, int)})
    totals.update(_unreadable(tasks, infos))
    keys = {task.key for task in tasks}
    for path in list((out / "parts").iterdir()):
        if path.name.split(".")[0] not in keys or path.suffix == ".partial":
            path.unlink()
    manifest = {
        "version": VERSION,
        "dtype": token_dtype(encoder.vocab_size).name,
        "domains": domains,
        "languages": languages,
        # Set only if the store contains dialogues; the export writes this template to the tokenizer.
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
    """Raises `UserError` if no document can be used, or more than the share `max_rejected` of the rows is rejected.

    The number of rows in a truncated file is unknown, so such files are weighted by their size in bytes.
    """
    documents = sum(info["counts"]["documents"] for info in infos)
    dropped: Counter[str] = Counter()
    for info in infos:
        dropped.update(info["dropped"])
    first = json.dumps(rejected[0], ensure_ascii=False) if rejected else ""
    if not documents:
        detail = (
            f"; the first rejected row: {first}"
            if first
            else f"; dropped: {dropped.most_common(1)[0][0]}"
            if dropped
            else ""
        )
        raise UserError(
            f"no document could be used{detail}",
            key=config.data.sources[0].path,
            remedy="Give other data, or change the template or the cleaning",
        )
    reasons = Counter(row["reason"].split(":")[0] for row in rejected)
    summary = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.most_common(3))
    counts = {"rejected": len(rejected), "read": documents + dropped.total() + len(rejected)}
    refuse_rejected_share(config, counts | _unreadable(tasks, infos), f" ({summary}); the first: {first}")


def _unreadable(tasks: list[EncodeTask], infos: list[dict[str, Any]]) -> dict[str, int]:
    """The bytes of the files that cannot be read to their end, and of all files."""
    broken = [task for task, info in zip(tasks, infos, strict=True) if any(not row["line"] for row in info["rejected"])]
    return {"unreadable_bytes": sum(task.size for task in broken), "source_bytes": sum(task.size for task in tasks)}


def refuse_rejected_share(config: PrepareConfig, counts: dict[str, int], detail: str = "") -> None:
    """Raises `UserError` if more than the share `max_rejected` of the rows or of the bytes cannot be used.

    The number of rows in a truncated file is unknown, so such files count with their bytes.
    """
    limit, remedy = config.max_rejected, "raise max_rejected; parts encoded so far are reused"
    if counts["unreadable_bytes"] > limit * counts["source_bytes"]:
        raise UserError(
            f"files of {counts['unreadable_bytes']:,} of {counts['source_bytes']:,} bytes cannot be read to their end"
            f"{detail}",
            key="max_rejected",
            value=limit,
            remedy=f"Replace them, or {remedy}",
        )
    if counts["rejected"] > limit * counts["read"]:
        raise UserError(
            f"{counts['rejected']:,} of {counts['read']:,} rows cannot be used{detail}",
            key="max_rejected",
            value=limit,
            remedy=f"Correct the files, or {remedy}",
        )
