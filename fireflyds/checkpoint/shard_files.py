"""What trains as pieces in files: every piece knows its parameter and its place in it, so any number of ranks can read them.

A rank's file `rank-00001.safetensors` holds one-dimensional tensors named `<parameter>|<first element>|<kind>`. Kinds are
`master` (the weights in the optimizer's number format), the optimizer's states (`exp_avg`, ...), and its counters
(`#step`), of one element each. States that belong to a rank's whole partition, and cannot be cut, are named
`raw|<number of the partition>|<kind>`.
"""

import json
import shutil
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fireflyds.checkpoint.storage import files_in, sha256_of
from fireflyds.errors import UserError
from fireflyds.fs import atomic_write_text, fsync, read_json
from fireflyds.zero.partitions import MASTER, OPAQUE, SCALAR, FlatPartition

# 2: trained tensors stand in the shards alone.
FORMAT_VERSION = 2
MANIFEST, CHECKSUMS = "manifest.json", "checksums.json"


def stage_to_cpu(stretches: Iterator[tuple[int, FlatPartition]]) -> dict[str, Tensor]:
    """Copies on the host, by the names of the file. The numbers tell stretches apart."""
    copies: dict[str, Tensor] = {}

    def keep(name: str, value: Any) -> None:
        # A copy also where the weights are on the host already: training goes on while this is written.
        copies[name] = torch.as_tensor(value).detach().reshape(-1).to("cpu", copy=True)

    for number, partition in stretches:
        raw = partition.has_opaque_state
        states = {key: value for key, value in partition.state.items() if isinstance(value, Tensor | int | float)}
        for part in partition.slices:
            at = slice(part.offset, part.offset + part.length)
            keep(f"{part.name}|{part.first}|{MASTER}", partition.master.view(-1)[at])
            for key, value in () if raw else states.items():
                if partition.is_per_element(value):
                    keep(f"{part.name}|{part.first}|{key}", torch.as_tensor(value).view(-1)[at])
                else:
                    keep(f"{part.name}|{part.first}|{SCALAR}{key}", value)
        for key, value in states.items() if raw else ():
            keep(f"{OPAQUE}|{number}|{key}", value)
    return copies


def write_shard(folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    """Write a rank's file and, when it is on the disk, its size and hash beside it.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    file = folder / f"rank-{rank:05d}.safetensors"
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # it tells of the disk in its own words
        raise OSError(str(error)) from error
    fsync(file)
    about = file.with_suffix(".json")
    aside = about.with_suffix(".about")
    aside.write_text(json.dumps({"bytes": file.stat().st_size, "sha256": sha256_of(file)}))
    shutil.copymode(aside, file)  # safetensors lets nobody else read
    fsync(aside)
    # Last of all: rank 0 takes it away when all have theirs.
    aside.rename(about)


class ShardReader:
    """The files of all ranks, read as whole parameters or any part of one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_json(folder / MANIFEST)
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in manifest["parameters"].items()}
        self.layout = manifest["layout"]

    @cached_property
    def _index(self) -> dict[tuple[str, str], list[tuple[int, int, Any, str]]]:
        """By parameter and kind: first element, length, file and key of every piece."""
        index = defaultdict(list)
        for file in sorted(self.folder.glob("rank-*.safetensors")):
            try:
                opened = safe_open(file, "pt")
                for key in opened.keys():  # noqa: SIM118
                    name, first, kind = key.rsplit("|", 2)
                    length = opened.get_slice(key).get_shape()[0]
                    index[(f"{name}|{file.stem}" if name == OPAQUE else name), kind].append(
                        (int(first), length, opened, key)
                    )
            except SafetensorError as error:
                raise UserError(f"{file}: cannot be read ({error}). Go on from a checkpoint before") from error
        return dict(index)

    def state_names(self, name: str) -> list[str]:
        """What there is of a parameter beside its weights."""
        return [kind for known, kind in self._index if known == name and kind != MASTER]

    @property
    def has_opaque_states(self) -> bool:
        return any(name.startswith(f"{OPAQUE}|") for name, _ in self._index)

    def opaque_states(self, rank: int, number: int) -> dict[str, Tensor]:
        """States of a whole partition of a rank, as that rank saved them."""
        of_rank = f"{OPAQUE}|rank-{rank:05d}"
        return {
            kind: opened.get_tensor(key)
            for (name, kind), pieces in self._index.items()
            if name == of_rank
            for first, _, opened, key in pieces
            if first == number
        }

    def scalar_state(self, name: str, kind: str) -> float:
        """The same wherever it is kept."""
        *_, opened, key = self._index[name, kind][0]
        return float(opened.get_tensor(key))

    def read(self, name: str, kind: str, first: int, length: int) -> Tensor:
        """Elements `[first, first + length)`, put together from the pieces they lie in.

        Raises:
            UserError: not all of them were saved.
        """
        found: Tensor | None = None
        covered = 0
        for start, size, opened, key in self._index.get((name, kind), ()):
            low, high = max(first, start), min(first + length, start + size)
            if low < high:
                piece = opened.get_slice(key)[low - start : high - start]
                found = piece.new_empty(length) if found is None else found
                found[low - first : high - first] = piece
                covered += high - low
        if found is None or covered < length:
            raise UserError(
                f"{self.folder}: holds {covered} of {length} elements of {name} ({kind}). Go on from a checkpoint before, "
                "or give the run that this is of"
            )
        return found

    def require_complete(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises `UserError` unless every one of these parameters is there, of its shape, and its elements all once."""
        for name, shape in expected.items():
            pieces = sum(length for _, length, _, _ in self._index.get((name, MASTER), ()))
            if self.shapes.get(name) != shape or pieces != torch.Size(shape).numel():
                raise UserError(
                    f"{self.folder}: {name} was not saved whole ({pieces} elements of {[*shape]}). The checkpoint before is "
                    "whole; every rank must write to the same folder: give runs= on a disk that all nodes share"
                )
        if not any(piece.any() for name in expected for piece in [self.read(name, MASTER, 0, self._numel(name))]):
            raise UserError(f"{self.folder}: all weights were saved as zeros. The checkpoint before is whole")

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Every parameter that trained, whole."""
        for name in self.shapes:
            yield name, self.weight(name)

    def weight(self, name: str) -> Tensor:
        """A parameter that trained, whole, in the optimizer's number format."""
        return self.read(name, MASTER, 0, self._numel(name)).view(self.shapes[name])

    def _numel(self, name: str) -> int:
        return int(torch.Size(self.shapes[name]).numel())


def write_checksums(folder: Path) -> None:
    """Write down sizes and hashes of all files, from now on to be checked, and wait for the disk."""
    known = {}
    for file in list(files_in(folder)):
        name = str(file.relative_to(folder))
        if name.startswith("rank-") and file.suffix == ".json":
            known[f"{file.stem}.safetensors"] = read_json(file)
            file.unlink()
        elif not name.startswith("rank-"):
            fsync(file)
            known[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    atomic_write_text(folder / CHECKSUMS, json.dumps(known, indent=2))
    fsync(folder)


def find_corruption(folder: Path, share: int = 0, shares: int = 1) -> str | None:
    """What is wrong with a sealed folder, or None. Of its files only every `shares`-th is read."""
    try:
        known = read_json(folder / CHECKSUMS)
    except UserError:
        return f"{CHECKSUMS} is missing or damaged"
    for name, wanted in sorted(known.items())[share::shares]:
        try:
            wrong = _corruption_of(folder / name, wanted)
        except OSError as error:  # a bad sector
            wrong = f"cannot be read: {error.strerror}"
        if wrong:
            return f"{name} {wrong}"
    return None


def _corruption_of(file: Path, wanted: dict[str, Any]) -> str | None:
    if not file.is_file():
        return "is missing"
    if (size := file.stat().st_size) != wanted["bytes"]:
        return f"has {size} bytes of {wanted['bytes']}"
    return None if sha256_of(file) == wanted["sha256"] else "is not what was written (its hash differs)"
