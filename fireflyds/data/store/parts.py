"""Splits sources into parts that are read, cleaned and encoded independently by worker processes."""

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

from fireflyds.config import CleanConfig, Duplicates, Preference, PrepareConfig, SourceConfig, TextSplit
from fireflyds.data.chat_template import ChatTemplate, find_template
from fireflyds.data.clean.cleaner import Cleaner
from fireflyds.data.clean.duplicates import NUM_PERM, signature, text_hash
from fireflyds.data.encode import encode_samples
from fireflyds.data.read.encodings import UTF8
from fireflyds.data.read.files import find_files
from fireflyds.data.read.hub import is_dataset
from fireflyds.data.read.json_arrays import array_parts, holds_array
from fireflyds.data.read.records import FilePart, RejectedRow
from fireflyds.data.read.sources import read_part, source_parts
from fireflyds.data.read.streams import kind
from fireflyds.data.store.store import VERSION, PartWriter, is_intact, token_dtype
from fireflyds.types import Encoder, Sample

PART_BYTES = 8 << 20
_MAX_PARTS = 2048
_PR_SET_PDEATHSIG = 1
# Samples per call of the tokenizer.
_ENCODE_BATCH_SIZE = 256


@dataclass(frozen=True, slots=True)
class EncodeTask:
    """One part of one source. `key` hashes its contents and its encoding settings, except those of dialogues."""

    source: int
    part: FilePart
    size: int
    key: str


def plan_tasks(config: PrepareConfig, tokenizer: str) -> list[EncodeTask]:
    """Returns all parts of all sources, in order. Every file is read once to compute its hash."""
    settings = _settings(config.clean, tokenizer)
    tasks = []
    for number, source in enumerate(config.data.sources):
        prefix = f"{settings} {source.format} {source.split.name} {source.encoding}"
        for part, size, contents in _split_source(source):
            key = hashlib.sha256(f"{prefix} {contents}".encode()).hexdigest()[:24]
            tasks.append(EncodeTask(number, part, size, key))
    return tasks


def _settings(clean: CleanConfig, tokenizer: str) -> str:
    options = {name: str(value) for name, value in asdict(clean).items() if name != "similarity"}
    evaluation = [
        hashlib.sha256(file.read_bytes()).hexdigest() for path in clean.decontaminate for file in find_files(path)
    ]
    return json.dumps([VERSION, tokenizer, options, evaluation], sort_keys=True)


def _split_source(source: SourceConfig) -> Iterator[tuple[FilePart, int, str]]:
    """Yields the parts of a source with their size in bytes and a hash of their contents."""
    for part in source_parts(source):
        if is_dataset(part.file):
            yield part, 0, f"{_dataset_state(part.file)} {part.shard}"
            continue
        file = Path(part.file)
        splittable = file.suffix == ".jsonl" or (file.suffix == ".txt" and source.split is TextSplit.line)
        is_plain = kind(file) == file.suffix and source.encoding == UTF8
        if splittable and is_plain:
            yield from _split_by_line(file)
        elif file.suffix == ".json" and is_plain and file.stat().st_size > PART_BYTES and holds_array(str(file), UTF8):
            yield from _split_array(file)
        else:
            with file.open("rb") as stream:
                yield part, file.stat().st_size, f"{kind(file)} {hashlib.file_digest(stream, 'sha256').hexdigest()}"


def _split_by_line(file: Path) -> Iterator[tuple[FilePart, int, str]]:
    """Yields parts of about `PART_BYTES` bytes (more if there would be too many parts), which end at line breaks."""
    offset, line = 0, 1
    max_bytes = max(PART_BYTES, file.stat().st_size // _MAX_PARTS)
    with file.open("rb") as stream:
        while data := stream.read(max_bytes):
            data += stream.readline()
            contents = hashlib.sha256(data).hexdigest()
            yield (
                FilePart(str(file), offset, offset + len(data), line),
                len(data),
                f"{file.suffix} {line == 1} {contents}",
            )
            offset += len(data)
            line += data.count(b"\n")


def _split_array(file: Path) -> Iterator[tuple[FilePart, int, str]]:
    """Yields parts of a JSON array, which end between rows."""
    with file.open("rb") as stream:
        for start, end, row in array_parts(str(file)):
            stream.seek(start)
            contents = hashlib.sha256(stream.read(end - start)).hexdigest()
            yield FilePart(str(file), start, end, row), end - start, f"{file.suffix} {start == 0} {contents}"


def _dataset_state(path: str) -> str:
    """Returns names, sizes and modification times of a saved data set's files; only the name of one on the Hub."""
    files = sorted(Path(path).rglob("*")) if Path(path).is_dir() else []
    return json.dumps([path, *((str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files if f.is_file())])


@dataclass(frozen=True, slots=True)
class WorkerContext:
    """Settings that a worker process needs to encode parts."""

    load_encoder: Callable[[], Encoder]
    config: PrepareConfig
    dialogues: str
    """Hash of the settings that the encoding of dialogues depends on."""
    folder: Path


_encoder: Encoder
_chat: ChatTemplate
_cleaner: Cleaner
_context: WorkerContext


def init_worker(context: WorkerContext) -> None:
    """Loads the encoder and the cleaner, once per process."""
    global _encoder, _chat, _cleaner, _context
    # The workers already use all cores.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    _encoder, _cleaner, _context = context.load_encoder(), Cleaner(context.config.clean), context
    _chat = find_template(
        _encoder,
        context.config.template,
        learn_reasoning=context.config.learn_reasoning,
        context_turns=context.config.context_turns,
    )


def start_worker(context: WorkerContext) -> None:
    """Initializes a worker process that ignores SIGINT (the parent handles it) and is killed when its parent ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    init_worker(context)


def make_part(task: EncodeTask) -> dict[str, Any]:
    """Reads, cleans and encodes one part into the folder of the worker context. Returns its counts."""
    builder = _PartBuilder(task)
    for item in read_part(_context.config.data.sources[task.source], task.part):
        if isinstance(item, RejectedRow):
            builder.reject(item.line, item.reason)
            continue
        builder.formats[item.layout] += 1
        builder.unread.update(item.unread)
        if item.sample.rejected and _context.config.preference is Preference.pairs:
            builder.unread["rejected"] -= 1
        if item.marker:
            builder.markers[item.marker] += 1
        cleaned = _cleaner.clean(item.sample)
        if isinstance(cleaned, Sample):
            builder.add(cleaned, item.line)
        else:
            builder.dropped[cleaned] += 1
    return builder.close()


class _PartBuilder:
    """Encodes the samples of one part in batches and writes them."""

    def __init__(self, task: EncodeTask) -> None:
        self._task = task
        self.dropped: Counter[str] = Counter()
        self.formats: Counter[str] = Counter()
        self.unread: Counter[str] = Counter()
        self.markers: Counter[str] = Counter()
        self.rejected: list[dict[str, Any]] = []
        self._has_dialogues = False
        self._num_unknown = self._num_left_out = 0
        self._pending: list[tuple[Sample, int]] = []
        self._hashes: list[int] = []
        self._signatures: list[list[int]] = []
        self._writer = PartWriter(_context.folder, task.key, token_dtype(_encoder.vocab_size))

    def reject(self, line: int, reason: str) -> None:
        """Records a rejected row. Lines count from the start of the part, as it may be reused at another offset."""
        self.rejected.append({"line": line and line - self._task.part.first_line + 1, "reason": reason})

    def add(self, sample: Sample, line: int) -> None:
        self._has_dialogues |= sample.text is None
        self._pending.append((sample, line))
        if len(self._pending) == _ENCODE_BATCH_SIZE:
            self._encode()

    def _encode(self) -> None:
        samples = [sample for sample, _ in self._pending]
        config = _context.config
        encoded = encode_samples(
            _encoder, _chat, samples, config.loss_on, config.preference, [role.name for role in config.learn_roles]
        )
        for (sample, line), example in zip(self._pending, encoded, strict=True):
            if isinstance(example, str):
                self.reject(line, example)
                continue
            self._writer.add(example)
            self._num_left_out += example.left_out_thoughts
            if _encoder.unknown_id is not None:
                self._num_unknown += int(np.count_nonzero(example.input_ids == _encoder.unknown_id))
            if _context.config.clean.duplicates is not Duplicates.keep:
                self._hash(sample)
        self._pending = []

    def _hash(self, sample: Sample) -> None:
        text = sample.text if sample.text is not None else "\n".join(m.reasoning + m.content for m in sample.messages)
        text += "".join(f"\0{message.content}" for message in sample.rejected)
        # Equal dialogues whose loss is on different answers are no duplicates.
        unlearned = "".join(f"\0{number}" for number, message in enumerate(sample.messages) if not message.learn)
        self._hashes.append(text_hash(text + unlearned))
        if _context.config.clean.duplicates is Duplicates.near:
            self._signatures.append(signature(text))

    def close(self) -> dict[str, Any]:
        self._encode()
        info = {
            "key": self._task.key,
            "dialogues": _context.dialogues,
            "counts": self._writer.counts(),
            "dropped": self.dropped,
            "formats": self.formats,
            "unread": self.unread,
            "markers": self.markers,
            "rejected": self.rejected,
            "unknown": self._num_unknown,
            "left_out_thoughts": self._num_left_out,
            "has_dialogues": self._has_dialogues,
        }
        arrays: dict[str, Any] = {}
        if _context.config.clean.duplicates is not Duplicates.keep:
            arrays["hashes"] = np.asarray(self._hashes, np.uint64)
        if _context.config.clean.duplicates is Duplicates.near:
            arrays["signatures"] = np.asarray(self._signatures, np.uint32).reshape(-1, NUM_PERM)
        self._writer.close(info, **arrays)
        return info


def finished_part(folder: Path, task: EncodeTask, dialogues: str) -> dict[str, Any] | None:
    """Returns the counts of a complete and undamaged part in `folder` that can be reused, or None."""
    file = folder / f"{task.key}.json"
    try:
        info: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    fits = info.get("dialogues") == dialogues or not info["has_dialogues"]
    return info if fits and is_intact(folder, task.key, info) else None
