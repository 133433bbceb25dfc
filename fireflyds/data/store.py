"""The token store: what `prepare` writes once and `train` maps into memory at any `seq_len`.

ids.bin          uint16 or uint32, all documents end to end
index.npz        offsets int64 [n + 1], domain_ids uint8 [n], num_bytes int64 [n],
                 span_offsets int64 [n + 1], spans int64 [m, 2] (token ranges within a document)
rejected.jsonl   rows that could not be used: file, line, reason
manifest.json    what it was made from, with counts; written last
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from fireflyds.errors import UserError
from fireflyds.types import Example

MANIFEST = "manifest.json"
VERSION = 1


class StoreWriter:
    """Appends examples to a store folder."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._folder = folder
        self._dtype = np.uint16 if vocab_size <= 1 << 16 else np.uint32
        self._ids: BinaryIO = (folder / "ids.bin").open("wb")
        self._domains: list[str] = []
        self._lengths: list[int] = []
        self._domain_ids: list[int] = []
        self._num_bytes: list[int] = []
        self._span_counts: list[int] = []
        self._spans: list[tuple[int, int]] = []

    def add(self, example: Example, domain: str) -> None:
        if domain not in self._domains:
            self._domains.append(domain)
        self._ids.write(example.input_ids.astype(self._dtype).tobytes())
        self._lengths.append(len(example.input_ids))
        self._domain_ids.append(self._domains.index(domain))
        self._num_bytes.append(example.num_bytes)
        self._span_counts.append(len(example.spans))
        self._spans += example.spans

    def close(self, manifest: dict[str, Any]) -> None:
        """Write the index and, last, the manifest with the totals of what was added."""
        self._ids.close()
        np.savez(
            self._folder / "index.npz",
            offsets=np.cumsum([0, *self._lengths]),
            domain_ids=np.asarray(self._domain_ids, np.uint8),
            num_bytes=np.asarray(self._num_bytes, np.int64),
            span_offsets=np.cumsum([0, *self._span_counts]),
            spans=np.asarray(self._spans, np.int64).reshape(-1, 2),
        )
        document = manifest | {"version": VERSION, "dtype": np.dtype(self._dtype).name, "domains": self._domains}
        (self._folder / MANIFEST).write_text(json.dumps(document, ensure_ascii=False, indent=2), encoding="utf-8")


class TokenStore:
    """A store opened for reading. Nothing is loaded but the index."""

    def __init__(self, folder: str | Path) -> None:
        folder = Path(folder)
        self.path = folder
        self.manifest = read_manifest(folder)
        if self.manifest["version"] != VERSION:
            raise UserError(
                f"data.store={folder}: version {self.manifest['version']}, this code reads {VERSION}. Prepare it again"
            )
        index = np.load(folder / "index.npz")
        self.offsets: np.ndarray = index["offsets"]
        self.domain_ids: np.ndarray = index["domain_ids"]
        self.num_bytes: np.ndarray = index["num_bytes"]
        self.span_offsets: np.ndarray = index["span_offsets"]
        self.spans: np.ndarray = index["spans"]
        self.domains: list[str] = self.manifest["domains"]
        self._ids = np.memmap(folder / "ids.bin", dtype=self.manifest["dtype"], mode="r")
        if len(self._ids) != self.offsets[-1]:
            raise UserError(
                f"data.store={folder}: ids.bin has {len(self._ids)} tokens, the index says {self.offsets[-1]}. Prepare it again"
            )

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document: int64 `[n]`."""
        return np.diff(self.offsets)

    def ids(self, document: int, start: int, length: int) -> np.ndarray:
        """`length` token ids of a document from its token `start` on: int64 `[length]`."""
        at = self.offsets[document] + start
        return self._ids[at : at + length].astype(np.int64)

    def spans_of(self, document: int) -> np.ndarray:
        """The learned token ranges of a document: int64 `[k, 2]`."""
        return self.spans[self.span_offsets[document] : self.span_offsets[document + 1]]

    def __iter__(self) -> Iterator[np.ndarray]:
        for document, length in enumerate(self.lengths):
            yield self.ids(document, 0, int(length))


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a store.

    Raises:
        UserError: the folder is no whole store.
    """
    file = folder / MANIFEST
    if not file.is_file():
        raise UserError(
            f"data.store={folder}: no token store there ({MANIFEST} is missing). Make one with launch/prepare.py out={folder}"
        )
    manifest: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return manifest
