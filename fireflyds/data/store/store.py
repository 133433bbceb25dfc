"""The token store: what `prepare` writes once and `train` maps into memory at any `seq_len`.

parts/<key>.ids       uint16 or uint32, the documents of one stretch of one source end to end
parts/<key>.npz       their lengths, byte lengths and learned spans (and hashes, where duplicates are looked for)
parts/<key>.json      counts, written last: a part without it is not whole
index/*.npy           of all documents that are kept, in order: part int32, start int64 (within the part), length int32,
                      domain uint16, language uint16, num_bytes int64, span_offsets int64 [n + 1], spans int32 [m, 2];
                      sentence_ends: ids of tokens that end a sentence
rejected.jsonl        rows that could not be used: file, line, reason
manifest.json         what it was made from, with counts; written last
"""

import hashlib
import json
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fireflyds.errors import UserError
from fireflyds.fs import plain_file_name, read_json
from fireflyds.types import Example

MANIFEST = "manifest.json"
VERSION = 2
INDEX = ("part", "start", "length", "domain", "language", "num_bytes", "span_offsets", "spans", "sentence_ends")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


class PartWriter:
    """Writes the documents of one part aside, and gives it its names when it is whole.

    Files of an earlier part of that name may be shared with a finished store, so they are replaced, never written into.
    """

    def __init__(self, folder: Path, key: str, dtype: np.dtype[Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._base, self._dtype = folder / key, dtype
        self._base.with_suffix(".json").unlink(missing_ok=True)
        self._file: BinaryIO = self._aside(".ids").open("wb")
        self._lengths: list[int] = []
        self._num_bytes: list[int] = []
        self._spans: list[tuple[int, int]] = []
        self._span_counts: list[int] = []

    def add(self, example: Example) -> None:
        self._file.write(example.input_ids.astype(self._dtype).tobytes())
        self._lengths.append(len(example.input_ids))
        self._num_bytes.append(example.num_bytes)
        # A document carries loss throughout, which needs no span.
        spans = () if example.is_document else example.spans
        self._spans += spans
        self._span_counts.append(len(spans))

    def counts(self) -> dict[str, int]:
        """Of what was added."""
        return {
            "documents": len(self._lengths),
            "dialogues": sum(count > 0 for count in self._span_counts),
            "tokens": sum(self._lengths),
            "bytes": sum(self._num_bytes),
        }

    def close(self, info: dict[str, Any], **more: Any) -> None:
        """Write the arrays and, last, `info`."""
        self._file.close()
        with self._aside(".npz").open("wb") as file:
            np.savez(
                file,
                length=np.asarray(self._lengths, np.int32),
                num_bytes=np.asarray(self._num_bytes, np.int64),
                span_counts=np.asarray(self._span_counts, np.int32),
                spans=np.asarray(self._spans, np.int32).reshape(-1, 2),
                **more,
            )
        self._aside(".json").write_text(json.dumps(info, ensure_ascii=False), encoding="utf-8")
        for suffix in (".ids", ".npz", ".json"):
            self._aside(suffix).rename(self._base.with_suffix(suffix))

    def _aside(self, suffix: str) -> Path:
        return self._base.with_suffix(f"{suffix}.partial")


class TokenStore:
    """A store opened for reading. Nothing is loaded; ids and index are mapped. `key` is the field that names the folder."""

    def __init__(self, folder: str | Path, key: str = "data.store") -> None:
        folder = Path(folder)
        self.path, self._key = folder, key
        self.manifest = read_manifest(folder, key)
        if self.manifest["version"] != VERSION:
            raise UserError(
                f"{key}={folder}: version {self.manifest['version']}, this code reads {VERSION}. Prepare it again"
            )
        try:
            arrays = {name: _mapped(folder / "index" / f"{name}.npy") for name in INDEX}
        except (OSError, ValueError) as error:
            raise UserError(f"{key}={folder}: its index is damaged ({error}). Prepare it again") from error
        self._part, self._start = arrays["part"], arrays["start"]
        self.lengths = arrays["length"]
        """Tokens of each document: int32 `[n]`."""
        self.domain_ids, self.language_ids = arrays["domain"], arrays["language"]
        self.num_bytes = arrays["num_bytes"]
        self._span_offsets, self._spans = arrays["span_offsets"], arrays["spans"]
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
        found = file.stat().st_size // self._dtype.itemsize if file.exists() else 0
        if found != part["tokens"]:
            raise UserError(
                f"{self._key}={self.path}: {file.name} has {found} tokens, the manifest says {part['tokens']}. Prepare it again"
            )

    @property
    def key(self) -> str:
        """The field of the configuration that names the folder."""
        return self._key

    def identity(self) -> dict[str, Any]:
        """What a run records of the store it trains on: a hash of what it was made from, chat template and languages."""
        made_from = json.dumps(self.manifest["made_from"], sort_keys=True)
        return {
            "store": hashlib.sha256(made_from.encode()).hexdigest(),
            "template": self.manifest["template"],
            "languages": sorted({self.languages[index] for index in np.unique(self.language_ids)} - {""}),
        }

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def ids(self, document: int, start: int, length: int) -> np.ndarray:
        """`length` token ids of a document from its token `start` on, as stored."""
        part = int(self._part[document])
        tokens = self._parts[part]
        if tokens is None:
            tokens = self._parts[part] = self._open(part)
        at = int(self._start[document]) + start
        return tokens[at : at + length]

    def is_document(self, documents: np.ndarray) -> np.ndarray:
        """Which carry loss throughout: bool, in the order given."""
        same: np.ndarray = self._span_offsets[documents + 1] == self._span_offsets[documents]
        return same

    def spans_of(self, document: int) -> np.ndarray:
        """The learned token ranges of a document: int64 `[k, 2]`."""
        first, end = self._span_offsets[document], self._span_offsets[document + 1]
        if first == end:
            return np.array([[0, self.lengths[document]]], np.int64)
        return self._spans[first:end].astype(np.int64)

    def _open(self, part: int) -> np.ndarray:
        file = self.path / "parts" / f"{self.manifest['parts'][part]['key']}.ids"
        if file.stat().st_size == 0:
            return np.zeros(0, self._dtype)
        # A plain view: slices of memmap objects cost microseconds each.
        mapped: np.ndarray = np.asarray(np.memmap(file, self._dtype, mode="r"))
        return mapped


def open_store(key: str, folder: str, fingerprint: str, tokenizer: str) -> TokenStore:
    """The store that the field `key` names, made with the tokenizer of this fingerprint, which stands at `tokenizer`.

    Raises:
        UserError: no store, a damaged one, or one that was made with another tokenizer.
    """
    if not folder:
        raise UserError(f"{key} is empty: give {key}=<store made by launch/prepare.py>")
    store = TokenStore(folder, key)
    made_with = store.manifest["made_from"]["tokenizer"]
    if made_with != fingerprint:
        raise UserError(
            f"{key}={folder}: made with another tokenizer (hash {made_with[:12]}) than {tokenizer} (hash {fingerprint[:12]}). "
            f"Prepare it again with tokenizer={tokenizer}"
        )
    return store


def _mapped(file: Path) -> np.ndarray:
    mapped: np.ndarray = np.asarray(np.load(file, mmap_mode="r"))
    return mapped


def read_manifest(folder: Path, key: str = "data.store") -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        UserError: the folder is no whole store.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"{key}={folder}: no token store there ({MANIFEST} is missing). Make one with launch/prepare.py out={folder}"
        )
    manifest = read_json(file)
    if "made_from" not in manifest:
        raise UserError(f"{key}={folder}: its {MANIFEST} is not that of a token store. Give another folder")
    return manifest
