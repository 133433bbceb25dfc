"""The token store: written once by `prepare`, memory-mapped by `train` at any `seq_len`.

parts/<key>.ids       uint16 or uint32, the concatenated documents of one part of one source
parts/<key>.npz       their lengths, byte lengths and learned spans (and hashes, if duplicates are removed)
parts/<key>.json      counts, written last: a part without it is incomplete
index/*.npy           columns of all kept documents, in order: part int32, start int64 (within the part), length int32,
                      domain uint16, language uint16, num_bytes int64, rejected_start int32,
                      label int8, span_offsets int64 [n + 1], spans int32 [m, 2],
                      prompt_heads and prompt_tails int32 [m], prompt_offsets int64 [m + 1], prompts uint16 or uint32:
                      for every span its `TurnPrompt`; sentence_ends int64: ids of tokens that end a sentence
rejected.jsonl        rows that cannot be used: file, line, reason
manifest.json         provenance (`made_from`) and counts; written last
"""

import hashlib
import json
import os
import socket
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fireflyds.errors import UserError
from fireflyds.fs import plain_file_name, read_json
from fireflyds.types import Example, TurnPrompt

MANIFEST = "manifest.json"
VERSION = 6
INDEX = (
    *("part", "start", "length", "domain", "language", "num_bytes", "rejected_start", "label"),
    *("span_offsets", "spans", "prompt_heads", "prompt_tails", "prompt_offsets", "prompts", "sentence_ends"),
)


_NO_PROMPT = TurnPrompt(0, np.zeros(0, np.uint32), 0)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns the smallest unsigned integer type that holds every token id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class PartWriter:
    """Writes the documents of one part to temporary files, which are renamed when the part is complete.

    Files of an earlier part with that key may be hard-linked into a finished store, so they are never modified.
    """

    def __init__(self, folder: Path, key: str, dtype: np.dtype[Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._base, self._dtype = folder / key, dtype
        self._base.with_suffix(".json").unlink(missing_ok=True)
        self._file: BinaryIO = self._temporary(".ids").open("wb")
        self._lengths: list[int] = []
        self._num_bytes: list[int] = []
        self._rejected_starts: list[int] = []
        self._labels: list[int] = []
        self._spans: list[tuple[int, int]] = []
        self._span_counts: list[int] = []
        self._prompts: list[TurnPrompt] = []

    def add(self, example: Example) -> None:
        """Appends the tokens, the byte length and the learned spans of one record."""
        self._file.write(example.input_ids.astype(self._dtype).tobytes())
        self._lengths.append(len(example.input_ids))
        self._num_bytes.append(example.num_bytes)
        self._rejected_starts.append(example.rejected_start)
        self._labels.append(example.label)
        # All tokens of a document carry loss: no span is stored.
        spans = () if example.is_document else example.spans
        self._spans += spans
        self._span_counts.append(len(spans))
        self._prompts += example.prompts if len(example.prompts) == len(spans) else [_NO_PROMPT] * len(spans)

    def counts(self) -> dict[str, int]:
        """Returns the counts of the examples added so far."""
        return {
            "documents": len(self._lengths),
            "dialogues": sum(count > 0 for count in self._span_counts),
            "tokens": sum(self._lengths),
            "bytes": sum(self._num_bytes),
        }

    def close(self, info: dict[str, Any], **arrays: Any) -> None:
        """Writes the arrays and then `info`, and renames the files."""
        self._file.close()
        with self._temporary(".npz").open("wb") as file:
            np.savez(
                file,
                length=np.asarray(self._lengths, np.int32),
                num_bytes=np.asarray(self._num_bytes, np.int64),
                rejected_start=np.asarray(self._rejected_starts, np.int32),
                label=np.asarray(self._labels, np.int8),
                span_counts=np.asarray(self._span_counts, np.int32),
                spans=np.asarray(self._spans, np.int32).reshape(-1, 2),
                prompt_heads=np.asarray([prompt.head for prompt in self._prompts], np.int32),
                prompt_tails=np.asarray([prompt.tail for prompt in self._prompts], np.int32),
                prompt_lengths=np.asarray([len(prompt.middle) for prompt in self._prompts], np.int32),
                prompts=np.concatenate([_NO_PROMPT.middle, *(prompt.middle for prompt in self._prompts)]).astype(
                    self._dtype
                ),
                **arrays,
            )
        info["sha256"] = {suffix: _digest(self._temporary(suffix)) for suffix in (".ids", ".npz")}
        self._temporary(".json").write_text(json.dumps(info, ensure_ascii=False), encoding="utf-8")
        for suffix in (".ids", ".npz", ".json"):
            self._temporary(suffix).rename(self._base.with_suffix(suffix))

    def _temporary(self, suffix: str) -> Path:
        # Two processes may write a part where one was taken for lost.
        return self._base.with_suffix(f"{suffix}.{socket.gethostname()}-{os.getpid()}.partial")


def is_intact(folder: Path, key: str, info: dict[str, Any]) -> bool:
    """True where the files of a part have the hashes that its `info` records."""
    files = {suffix: folder / f"{key}{suffix}" for suffix in (".ids", ".npz")}
    return all(file.is_file() and _digest(file) == info["sha256"][suffix] for suffix, file in files.items())


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class TokenStore:
    """A store opened for reading; ids and index are memory-mapped. `key`: configuration field that names the folder."""

    def __init__(self, folder: str | Path, key: str = "data.store") -> None:
        folder = Path(folder)
        self.path, self._key = folder, key
        self.manifest = read_manifest(folder, key)
        if self.manifest.get("version") != VERSION:
            raise UserError(
                f"version {self.manifest.get('version')}, this code reads {VERSION}",
                key=key,
                value=folder,
                remedy="Prepare it again",
            )
        try:
            arrays = {name: _load_mapped(folder / "index" / f"{name}.npy") for name in INDEX}
        except (OSError, ValueError) as error:
            raise UserError(
                f"its index is damaged ({error})", key=key, value=folder, remedy="Prepare it again"
            ) from error
        self._part, self._start = arrays["part"], arrays["start"]
        self.lengths = arrays["length"]
        """Tokens of each document: int32 `[n]`."""
        self.domain_ids, self.language_ids = arrays["domain"], arrays["language"]
        self.num_bytes = arrays["num_bytes"]
        self.rejected_starts, self.labels = arrays["rejected_start"], arrays["label"]
        self._span_offsets, self._spans = arrays["span_offsets"], arrays["spans"]
        self._prompt_heads, self._prompt_tails = arrays["prompt_heads"], arrays["prompt_tails"]
        self._prompt_offsets, self._prompts = arrays["prompt_offsets"], arrays["prompts"]
        self.sentence_ends = arrays["sentence_ends"]
        self.domains: list[str] = self.manifest["domains"]
        self.languages: list[str] = self.manifest["languages"]
        self._dtype = np.dtype(self.manifest["dtype"])
        self._parts: list[np.ndarray | None] = [None] * len(self.manifest["parts"])
        for part in self.manifest["parts"]:
            self._check(part)

    def _check(self, part: dict[str, Any]) -> None:
        plain_file_name(part["key"], self.path / MANIFEST)
        file = self.path / "parts" / f"{part['key']}.ids"
        num_stored = file.stat().st_size // self._dtype.itemsize if file.exists() else 0
        if num_stored != part["tokens"]:
            raise UserError(
                f"{file.name} has {num_stored} tokens, the manifest records {part['tokens']}",
                key=self._key,
                value=self.path,
                remedy="Prepare it again",
            )

    @property
    def key(self) -> str:
        """The configuration field that names the folder."""
        return self._key

    def identity(self) -> dict[str, Any]:
        """Returns the metadata that a run records of its store: hash of the provenance, chat template and languages."""
        provenance = json.dumps(self.manifest["made_from"], sort_keys=True)
        return {
            "store": hashlib.sha256(provenance.encode()).hexdigest(),
            "template": self.manifest["template"],
            "languages": sorted({self.languages[index] for index in np.unique(self.language_ids)} - {""}),
        }

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all documents."""
        return int(self.lengths.sum(dtype=np.int64))

    def ids(self, document: int, start: int, length: int) -> np.ndarray:
        """Returns `length` token ids of a document from its token `start`: uint16 or uint32 `[length]`."""
        part = int(self._part[document])
        tokens = self._parts[part]
        if tokens is None:
            tokens = self._parts[part] = self._open(part)
        offset = int(self._start[document]) + start
        return tokens[offset : offset + length]

    def is_document(self, documents: np.ndarray) -> np.ndarray:
        """True where all tokens of a document carry loss: bool, in the order of `documents`."""
        without_spans: np.ndarray = self._span_offsets[documents + 1] == self._span_offsets[documents]
        return without_spans

    def spans_of(self, document: int) -> np.ndarray:
        """Returns the learned token ranges of a document: int64 `[k, 2]`."""
        first, end = self._span_offsets[document], self._span_offsets[document + 1]
        if first == end:
            return np.array([[0, self.lengths[document]]], np.int64)
        return self._spans[first:end].astype(np.int64)

    def span_indices(self, document: int) -> range:
        """The numbers of the document's spans in the store, by which `prompt` finds their prompts."""
        return range(int(self._span_offsets[document]), int(self._span_offsets[document + 1]))

    def prompt_length(self, span: int) -> int:
        """The number of tokens of `prompt`."""
        middle = self._prompt_offsets[span + 1] - self._prompt_offsets[span]
        return int(self._prompt_heads[span] + middle + self._prompt_tails[span])

    def prompt(self, document: int, span: int) -> np.ndarray:
        """The tokens before a span in a dialogue that begins at its turn: uint16 or uint32 `[k]`, empty for turn 1."""
        head, tail = int(self._prompt_heads[span]), int(self._prompt_tails[span])
        middle = self._prompts[self._prompt_offsets[span] : self._prompt_offsets[span + 1]]
        before = self.ids(document, int(self._spans[span, 0]) - tail, tail)
        return np.concatenate([self.ids(document, 0, head), middle, before])

    def _open(self, part: int) -> np.ndarray:
        file = self.path / "parts" / f"{self.manifest['parts'][part]['key']}.ids"
        if file.stat().st_size == 0:
            return np.zeros(0, self._dtype)
        # A plain ndarray view: each slice of a memmap object would cost microseconds.
        tokens: np.ndarray = np.asarray(np.memmap(file, self._dtype, mode="r"))
        return tokens


def open_store(key: str, folder: str, fingerprint: str, tokenizer: str) -> TokenStore:
    """Opens a store and checks that it was made with the tokenizer at the path `tokenizer`, of hash `fingerprint`.

    `key` is the configuration field that names the folder.

    Raises:
        UserError: the folder is no store, or the store is damaged or was made with another tokenizer.
    """
    if not folder:
        raise UserError("is empty", key=key, remedy=f"Give {key}=<store made by launch/prepare.py>")
    store = TokenStore(folder, key)
    store_fingerprint = store.manifest["made_from"]["tokenizer"]
    if store_fingerprint != fingerprint:
        raise UserError(
            f"made with another tokenizer (hash {store_fingerprint[:12]}) than {tokenizer} (hash {fingerprint[:12]})",
            key=key,
            value=folder,
            remedy=f"Prepare it again with tokenizer={tokenizer}",
        )
    if np.any(store.rejected_starts) or np.any(store.labels >= 0):
        raise UserError(
            "holds preference pairs or labelled answers, of which the unwanted ones would be learned",
            key=key,
            value=folder,
            remedy="Prepare it with preference=chosen, which keeps the chosen answers alone",
        )
    return store


def _load_mapped(file: Path) -> np.ndarray:
    array: np.ndarray = np.asarray(np.load(file, mmap_mode="r"))
    return array


def read_manifest(folder: Path, key: str = "data.store") -> dict[str, Any]:
    """Returns the manifest of a store.

    Raises:
        UserError: the folder is not a complete store.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"no token store there ({MANIFEST} is missing)",
            key=key,
            value=folder,
            remedy=f"Make one with launch/prepare.py out={folder}",
        )
    manifest = read_json(file)
    if "made_from" not in manifest:
        raise UserError(
            f"its {MANIFEST} does not belong to a token store", key=key, value=folder, remedy="Give another folder"
        )
    return manifest
