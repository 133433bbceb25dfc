"""Sources cut into parts that are read, cleaned and encoded one by one, each in a process of its own."""

import ctypes
import hashlib
import json
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fireflyds.config import CleanConfig, Duplicates, LossOn, PrepareConfig, SourceConfig, TextSplit
from fireflyds.data.clean.cleaner import Cleaner
from fireflyds.data.clean.duplicates import NUM_PERM, signature, text_hash
from fireflyds.data.encode import encode_samples
from fireflyds.data.read.files import FilePart, RejectedRow, find_files, kind
from fireflyds.data.read.hub import is_dataset
from fireflyds.data.read.sources import read_part, source_parts
from fireflyds.data.store.store import VERSION, PartWriter, token_dtype
from fireflyds.types import Encoder, Sample

PART_BYTES = 8 << 20
_MOST_PARTS = 2048
_PR_SET_PDEATHSIG = 1
# Documents that go to the tokenizer in one call.
_TOGETHER = 256


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """One part of one source. `key` is a hash of its contents and of all that is done to it but the chat template."""

    source: int
    part: FilePart
    size: int
    key: str


def plan_tasks(config: PrepareConfig, tokenizer: str) -> list[EncodeTask]:
    """All parts of all sources, in order. Every file is read once, to be hashed."""
    settings = _settings(config.clean, tokenizer)
    tasks = []
    for number, source in enumerate(config.data.sources):
        reading = f"{settings} {source.format} {source.split.name}"
        for part, size, contents in _stretches(source):
            key = hashlib.sha256(f"{reading} {contents}".encode()).hexdigest()[:24]
            tasks.append(EncodeTask(number, part, size, key))
    return tasks


def _settings(clean: CleanConfig, tokenizer: str) -> str:
    said = {name: str(value) for name, value in asdict(clean).items() if name != "similarity"}
    evaluation = [
        hashlib.sha256(file.read_bytes()).hexdigest() for path in clean.decontaminate for file in find_files(path)
    ]
    return json.dumps([VERSION, tokenizer, said, evaluation], sort_keys=True)


def _stretches(source: SourceConfig) -> Iterator[tuple[FilePart, int, str]]:
    """Parts of a source with their size in bytes and a hash of their contents."""
    for whole in source_parts(source):
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


def _by_line(file: Path) -> Iterator[tuple[FilePart, int, str]]:
    at, line = 0, 1
    most = max(PART_BYTES, file.stat().st_size // _MOST_PARTS)
    with file.open("rb") as stream:
        while data := stream.read(most):
            data += stream.readline()
            contents = hashlib.sha256(data).hexdigest()
            yield FilePart(str(file), at, at + len(data), line), len(data), f"{file.suffix} {line == 1} {contents}"
            at += len(data)
            line += data.count(b"\n")


def _dataset_state(path: str) -> str:
    """Names, sizes and times of a saved folder; the name alone of a data set on the hub."""
    files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else []
    return json.dumps([path, *((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())])


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """What a process needs to make parts."""

    load_encoder: Callable[[], Encoder]
    sources: list[SourceConfig]
    template: str
    loss_on: LossOn
    clean: CleanConfig
    folder: Path


_encoder: Encoder
_cleaner: Cleaner
_workshop: WorkerContext


def init_worker(workshop: WorkerContext) -> None:
    """Load what every part needs, once in a process."""
    global _encoder, _cleaner, _workshop
    # Every core has a process already.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder, _cleaner, _workshop = workshop.load_encoder(), Cleaner(workshop.clean), workshop


def start_worker(workshop: WorkerContext) -> None:
    """Open the workshop in a process that leaves Ctrl-C to the one that started it, and ends with that one."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    init_worker(workshop)


def make_part(task: EncodeTask) -> dict[str, Any]:
    """Read, clean and encode one part into the workshop's folder. Returns its counts."""
    making = _PartBuilder(task)
    for item in read_part(_workshop.sources[task.source], task.part):
        if isinstance(item, RejectedRow):
            making.reject(item.line, item.reason)
            continue
        making.formats[item.layout] += 1
        cleaned = _cleaner.clean(item.sample)
        if isinstance(cleaned, Sample):
            making.add(cleaned, item.line)
        else:
            making.dropped[cleaned] += 1
    return making.close()


class _PartBuilder:
    """A part that is being made."""

    def __init__(self, task: EncodeTask) -> None:
        self._task = task
        self.dropped: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.rejected: list[dict[str, Any]] = []
        self._speaks = False
        self._waiting: list[tuple[Sample, int]] = []
        self._hashes: list[int] = []
        self._signatures: list[list[int]] = []
        self._writer = PartWriter(_workshop.folder, task.key, token_dtype(_encoder.vocab_size))

    def reject(self, line: int, reason: str) -> None:
        """Lines are counted from the part's beginning: the part may be used again in another place."""
        self.rejected.append({"line": line and line - self._task.part.first_line + 1, "reason": reason})

    def add(self, sample: Sample, line: int) -> None:
        self._speaks |= sample.text is None
        self._waiting.append((sample, line))
        if len(self._waiting) == _TOGETHER:
            self._encode()

    def _encode(self) -> None:
        samples = [sample for sample, _ in self._waiting]
        encoded = encode_samples(_encoder, _workshop.template, samples, _workshop.loss_on)
        for (sample, line), example in zip(self._waiting, encoded, strict=True):
            if isinstance(example, str):
                self.reject(line, example)
                continue
            self._writer.add(example)
            if _workshop.clean.duplicates is not Duplicates.keep:
                self._hash(sample)
        self._waiting = []

    def _hash(self, sample: Sample) -> None:
        words = sample.text if sample.text is not None else "\n".join(m.content for m in sample.messages)
        self._hashes.append(text_hash(words))
        if _workshop.clean.duplicates is Duplicates.near:
            self._signatures.append(signature(words))

    def close(self) -> dict[str, Any]:
        self._encode()
        info = {
            "key": self._task.key,
            "template": _workshop.template,
            "loss_on": _workshop.loss_on.name,
            "counts": self._writer.counts(),
            "dropped": self.dropped,
            "formats": self.formats,
            "rejected": self.rejected,
            "speaks": self._speaks,
        }
        more: dict[str, Any] = {}
        if _workshop.clean.duplicates is not Duplicates.keep:
            more["hashes"] = np.asarray(self._hashes, np.uint64)
        if _workshop.clean.duplicates is Duplicates.near:
            more["signatures"] = np.asarray(self._signatures, np.uint32).reshape(-1, NUM_PERM)
        self._writer.close(info, **more)
        return info


def finished_part(folder: Path, task: EncodeTask, template: str, loss_on: LossOn) -> dict[str, Any] | None:
    """The counts of a part that stands whole in a folder and needs not be made again."""
    file = folder / f"{task.key}.json"
    if not file.is_file():
        return None
    info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    # A chat template touches dialogues alone.
    same = (info["template"], info["loss_on"]) == (template, loss_on.name) or not info["speaks"]
    return info if same else None
