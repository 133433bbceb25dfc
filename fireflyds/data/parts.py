"""Sources cut into parts that are read, cleaned and encoded one by one, each in a process of its own."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fireflyds.config import CleanConfig, Duplicates, LossOn, PrepareConfig, SourceConfig, TextSplit
from fireflyds.data.clean import Cleaner
from fireflyds.data.duplicates import NUM_PERM, signature, text_hash
from fireflyds.data.encode import encode_sample
from fireflyds.data.files import Part, Rejected, kind
from fireflyds.data.hub import is_dataset
from fireflyds.data.sources import parts_of, read_part
from fireflyds.data.store import VERSION, PartWriter, token_dtype
from fireflyds.errors import UserError
from fireflyds.types import Encoder, Sample

PART_BYTES = 8 << 20
_MOST_PARTS = 2048


@dataclass(frozen=True, slots=True)
class Task:
    """One part of one source. `key` is a hash of its contents and of all that is done to it but the chat template."""

    source: int
    part: Part
    size: int
    key: str


def plan_tasks(config: PrepareConfig, tokenizer: str) -> list[Task]:
    """All parts of all sources, in order. Every file is read once, to be hashed."""
    settings = _settings(config.clean, tokenizer)
    tasks = []
    for number, source in enumerate(config.data.sources):
        reading = f"{settings} {source.format} {source.split.name}"
        for part, size, contents in _stretches(source):
            key = hashlib.sha256(f"{reading} {contents}".encode()).hexdigest()[:24]
            tasks.append(Task(number, part, size, key))
    return tasks


def _settings(clean: CleanConfig, tokenizer: str) -> str:
    said = {name: str(value) for name, value in asdict(clean).items() if name != "similarity"}
    evaluation = [hashlib.sha256(file.read_bytes()).hexdigest() for file in _evaluation_files(clean)]
    return json.dumps([VERSION, tokenizer, said, evaluation], sort_keys=True)


def _evaluation_files(clean: CleanConfig) -> Iterator[Path]:
    from fireflyds.data.files import find_files

    for path in clean.decontaminate:
        yield from find_files(path)


def _stretches(source: SourceConfig) -> Iterator[tuple[Part, int, str]]:
    """Parts of a source with their size in bytes and a hash of their contents."""
    for whole in parts_of(source):
        if is_dataset(whole.file):
            yield whole, 0, _dataset_state(whole.file)
            continue
        file = Path(whole.file)
        by_line = file.suffix == ".jsonl" or (file.suffix == ".txt" and source.split is TextSplit.line)
        if by_line and kind(file) == file.suffix:
            yield from _by_line(file)
        else:
            with file.open("rb") as stream:
                yield whole, file.stat().st_size, f"{kind(file)} {hashlib.file_digest(stream, 'sha256').hexdigest()}"


def _by_line(file: Path) -> Iterator[tuple[Part, int, str]]:
    at, line = 0, 1
    most = max(PART_BYTES, file.stat().st_size // _MOST_PARTS)
    with file.open("rb") as stream:
        while data := stream.read(most):
            data += stream.readline()
            contents = hashlib.sha256(data).hexdigest()
            yield Part(str(file), at, at + len(data), line), len(data), f"{file.suffix} {line == 1} {contents}"
            at += len(data)
            line += data.count(b"\n")


def _dataset_state(path: str) -> str:
    """Names, sizes and times of a saved folder; the name alone of a data set on the hub."""
    files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else []
    return json.dumps([path, *((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())])


@dataclass(frozen=True, slots=True)
class Workshop:
    """What a process needs to make parts."""

    load_encoder: Callable[[], Encoder]
    sources: list[SourceConfig]
    template: str
    loss_on: LossOn
    clean: CleanConfig
    folder: Path


_encoder: Encoder
_cleaner: Cleaner
_workshop: Workshop


def open_workshop(workshop: Workshop) -> None:
    """Load what every part needs, once in a process."""
    global _encoder, _cleaner, _workshop
    _encoder, _cleaner, _workshop = workshop.load_encoder(), Cleaner(workshop.clean), workshop


def make_part(task: Task) -> dict[str, Any]:
    """Read, clean and encode one part into the workshop's folder. Returns its counts."""
    counts: Counter[str] = Counter()
    dropped: Counter[str] = Counter()
    formats: Counter[str] = Counter()
    hashes: list[int] = []
    signatures: list[list[int]] = []
    source, mode = _workshop.sources[task.source], _workshop.clean.duplicates
    writer = PartWriter(_workshop.folder, task.key, token_dtype(_encoder.vocab_size))
    rejected: list[dict[str, Any]] = []
    for item in read_part(source, task.part):
        if isinstance(item, Rejected):
            rejected.append({"file": item.file, "line": item.line, "reason": item.reason})
            continue
        formats[item[0]] += 1
        cleaned = _cleaner.clean(item[1])
        if not isinstance(cleaned, Sample):
            dropped[cleaned] += 1
            continue
        try:
            example = encode_sample(_encoder, _workshop.template, cleaned, _workshop.loss_on)
        except UserError:
            raise
        except ValueError as error:
            dropped[str(error)] += 1
            continue
        writer.add(example)
        counts["documents"] += 1
        counts["dialogues"] += not example.is_document
        counts["tokens"] += len(example.input_ids)
        counts["bytes"] += example.num_bytes
        counts["learned"] += sum(end - start for start, end in example.spans)
        if mode is not Duplicates.keep:
            words = cleaned.text if cleaned.text is not None else "\n".join(m.content for m in cleaned.messages)
            hashes.append(text_hash(words))
            if mode is Duplicates.near:
                signatures.append(signature(words))
    info = {
        "key": task.key,
        "template": _workshop.template,
        "loss_on": _workshop.loss_on.name,
        "counts": {"documents": 0, "dialogues": 0, "tokens": 0, "bytes": 0, "learned": 0} | counts,
        "dropped": dropped,
        "formats": formats,
        "rejected": rejected,
    }
    more: dict[str, Any] = {"hashes": np.asarray(hashes, np.uint64)} if mode is not Duplicates.keep else {}
    if mode is Duplicates.near:
        more["signatures"] = np.asarray(signatures, np.uint32).reshape(-1, NUM_PERM)
    writer.close(info, **more)
    return info


def finished_part(folder: Path, task: Task, template: str, loss_on: LossOn) -> dict[str, Any] | None:
    """The counts of a part that stands whole in a folder and needs not be made again."""
    file = folder / f"{task.key}.json"
    if not file.is_file():
        return None
    info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    # A chat template touches dialogues alone.
    same = (info["template"], info["loss_on"]) == (template, loss_on.name) or not _speaks(info)
    return info if same else None


def _speaks(info: dict[str, Any]) -> bool:
    return bool(info["counts"]["dialogues"] or info["dropped"])
