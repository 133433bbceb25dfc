"""Shard files of a checkpoint: slices of parameters, named by parameter and offset, for reading on any number of ranks.

A rank's file `rank-00001.safetensors` holds one-dimensional tensors named `<parameter>|<first element>|<kind>`. Kinds
are `master` (the weights in the optimizer's dtype), the optimizer's states (`exp_avg`, ...), and its scalar states
(`#step`), of one element each. States that belong to a rank's whole partition, and cannot be divided, are named
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

from fireflyds.checkpoint.host_copies import HostCopier
from fireflyds.checkpoint.storage import files_in, sha256_of
from fireflyds.errors import UserError
from fireflyds.fs import atomic_write_text, fsync, read_json
from fireflyds.zero.partitions import MASTER, OPAQUE, SCALAR, FlatPartition

# Version 2: trained tensors are only in the shards.
FORMAT_VERSION = 2
MANIFEST, CHECKSUMS = "manifest.json", "checksums.json"


def stage_to_cpu(partitions: Iterator[tuple[int, FlatPartition]]) -> dict[str, Tensor]:
    """Copies partitions to host memory, by the names of the shard file. The numbers distinguish the partitions."""
    copies: dict[str, Tensor] = {}
    copier = HostCopier()

    def add_copy(name: str, value: Any) -> None:
        # Weights in host memory are copied too: training continues while the copy is written.
        copies[name] = copier.copy(torch.as_tensor(value))

    for number, partition in partitions:
        opaque = partition.has_opaque_state
        states = {key: value for key, value in partition.state.items() if isinstance(value, Tensor | int | float)}
        for param_slice in partition.slices:
            span = slice(param_slice.offset, param_slice.offset + param_slice.length)
            add_copy(f"{param_slice.name}|{param_slice.first}|{MASTER}", partition.master.view(-1)[span])
            for key, value in () if opaque else states.items():
                if partition.is_per_element(value):
                    add_copy(f"{param_slice.name}|{param_slice.first}|{key}", torch.as_tensor(value).view(-1)[span])
                else:
                    add_copy(f"{param_slice.name}|{param_slice.first}|{SCALAR}{key}", value)
        for key, value in states.items() if opaque else ():
            add_copy(f"{OPAQUE}|{number}|{key}", value)
    return copies


def write_shard(folder: Path, rank: int, tensors: dict[str, Tensor]) -> None:
    """Write a rank's shard file and, once that is synced to disk, a JSON file with its size and hash.

    Raises:
        OSError: the disk is full or cannot be written.
    """
    file = folder / f"rank-{rank:05d}.safetensors"
    try:
        save_file(tensors, file)
    except SafetensorError as error:  # raised for errors of the disk
        raise OSError(str(error)) from error
    fsync(file)
    metadata_file = file.with_suffix(".json")
    temporary = metadata_file.with_suffix(".tmp")
    temporary.write_text(json.dumps({"bytes": file.stat().st_size, "sha256": sha256_of(file)}))
    shutil.copymode(temporary, file)  # safetensors gives read permission to the owner only
    fsync(temporary)
    # Renamed last: rank 0 waits for this file of every rank, then removes it.
    temporary.rename(metadata_file)


class ShardReader:
    """Reads full parameters, or slices of them, from the shard files of all ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        manifest = read_json(folder / MANIFEST)
        self.shapes: dict[str, tuple[int, ...]] = {name: tuple(shape) for name, shape in manifest["parameters"].items()}
        self.layout = manifest["layout"]

    @cached_property
    def _index(self) -> dict[tuple[str, str], list[tuple[int, int, Any, str]]]:
        """By parameter and kind: first element, length, file and key of every slice."""
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
                raise UserError(
                    f"cannot be read ({error})", key=file, remedy="Resume from an earlier checkpoint"
                ) from error
        return dict(index)

    def state_names(self, name: str) -> list[str]:
        """Kinds of the saved optimizer states of a parameter."""
        return [kind for parameter, kind in self._index if parameter == name and kind != MASTER]

    @property
    def has_opaque_states(self) -> bool:
        """True where a saved state cannot be sliced with the weights, such as one quantised in blocks."""
        return any(name.startswith(f"{OPAQUE}|") for name, _ in self._index)

    def opaque_states(self, rank: int, number: int) -> dict[str, Tensor]:
        """Opaque states of partition `number` of a rank, as that rank saved them."""
        rank_key = f"{OPAQUE}|rank-{rank:05d}"
        return {
            kind: opened.get_tensor(key)
            for (name, kind), slices in self._index.items()
            if name == rank_key
            for first, _, opened, key in slices
            if first == number
        }

    def scalar_state(self, name: str, kind: str) -> float:
        """A scalar state of a parameter; all of its slices hold the same value."""
        *_, opened, key = self._index[name, kind][0]
        return float(opened.get_tensor(key))

    def read(self, name: str, kind: str, first: int, length: int) -> Tensor:
        """Elements `[first, first + length)` of a flattened parameter, assembled from its slices.

        Raises:
            UserError: not all of them were saved.
        """
        result: Tensor | None = None
        covered = 0
        for start, size, opened, key in self._index.get((name, kind), ()):
            low, high = max(first, start), min(first + length, start + size)
            if low < high:
                values = opened.get_slice(key)[low - start : high - start]
                result = values.new_empty(length) if result is None else result
                result[low - first : high - first] = values
                covered += high - low
        if result is None or covered < length:
            raise UserError(
                f"holds {covered} of {length} elements of {name} ({kind})",
                key=self.folder,
                remedy="Resume from an earlier checkpoint, or give the run that this checkpoint belongs to",
            )
        return result

    def require_complete(self, expected: dict[str, tuple[int, ...]]) -> None:
        """Raises `UserError` unless every parameter is present with its expected shape, each of its elements once."""
        for name, shape in expected.items():
            num_elements = sum(length for _, length, _, _ in self._index.get((name, MASTER), ()))
            if self.shapes.get(name) != shape or num_elements != torch.Size(shape).numel():
                raise UserError(
                    f"{name} was not saved completely ({num_elements} elements of {[*shape]})",
                    key=self.folder,
                    remedy="The previous checkpoint is intact; all ranks must write to the same folder: give runs= on "
                    "a disk that all nodes share",
                )
        if not any(values.any() for name in expected for values in [self.read(name, MASTER, 0, self._numel(name))]):
            raise UserError(
                "all weights were saved as zeros",
                key=self.folder,
                remedy="The previous checkpoint is intact; check optim.lr and hardware.precision, then run the same "
                "command again",
            )

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Yields name and full tensor of every trained parameter."""
        for name in self.shapes:
            yield name, self.weight(name)

    def weight(self, name: str) -> Tensor:
        """The full tensor of a trained parameter, in the optimizer's dtype."""
        return self.read(name, MASTER, 0, self._numel(name)).view(self.shapes[name])

    def _numel(self, name: str) -> int:
        return int(torch.Size(self.shapes[name]).numel())


def write_checksums(folder: Path) -> None:
    """Write the sizes and hashes of all files, which `find_corruption` checks, and sync everything to disk."""
    checksums = {}
    for file in list(files_in(folder)):
        name = str(file.relative_to(folder))
        if name.startswith("rank-") and file.suffix == ".json":
            checksums[f"{file.stem}.safetensors"] = read_json(file)
            file.unlink()
        elif not name.startswith("rank-"):
            fsync(file)
            checksums[name] = {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
    atomic_write_text(folder / CHECKSUMS, json.dumps(checksums, indent=2))
    fsync(folder)


def find_corruption(folder: Path, rank: int = 0, world_size: int = 1) -> str | None:
    """Describes the first corrupted file of a folder with checksums; None if there is none.

    Checks every `world_size`-th file, beginning with number `rank`.
    """
    try:
        checksums = read_json(folder / CHECKSUMS)
    except UserError:
        return f"{CHECKSUMS} is missing or damaged"
    for name, expected in sorted(checksums.items())[rank::world_size]:
        try:
            problem = _file_corruption(folder / name, expected)
        except OSError as error:  # a bad sector
            problem = f"cannot be read: {error.strerror}"
        if problem:
            return f"{name} {problem}"
    return None


def _file_corruption(file: Path, expected: dict[str, Any]) -> str | None:
    if not file.is_file():
        return "is missing"
    if (size := file.stat().st_size) != expected["bytes"]:
        return f"has {size} bytes of {expected['bytes']}"
    return None if sha256_of(file) == expected["sha256"] else "was changed after it was written (its hash differs)"
