"""Writes safetensors files tensor by tensor; the writer of the library needs the complete file in memory."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from fireflyds.errors import UserError
from fireflyds.fs import plain_file_name, read_json
from fireflyds.progress import Progress

MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int64: "I64", torch.int32: "I32",
    torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip


def shard_names(index: Path) -> list[str]:
    """Returns the distinct file names in a model's index (`*.index.json`), sorted.

    Raises:
        UserError: the index cannot be read, or has a name that is not a plain file name in its directory.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise UserError("has no weight_map", key=index, remedy="Get the file again")
    return sorted({plain_file_name(name, index) for name in weight_map.values()})


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """A tensor to be written: its shape and dtype, and a function that creates it when it is written."""

    shape: list[int]
    dtype: torch.dtype
    make: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Size of the tensor in bytes."""
        return int(torch.Size(self.shape).numel() * self.dtype.itemsize)


def save_streamed(file: Path, entries: dict[str, TensorEntry], progress: Progress | None = None) -> None:
    """Writes a safetensors file (https://github.com/huggingface/safetensors, section Format): the length of the header
    as a little-endian 64-bit integer, the header in JSON, padded to a multiple of eight bytes, and the tensor data.

    Raises:
        UserError: safetensors does not support the dtype of a tensor.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, entry in entries.items():
        if entry.dtype not in _DTYPES:
            raise UserError(
                f"{name} is {entry.dtype}, not supported by safetensors",
                key=file.name,
                remedy="Save the model in another dtype",
            )
        size = entry.num_bytes
        header[name] = {"dtype": _DTYPES[entry.dtype], "shape": entry.shape, "data_offsets": [offset, offset + size]}
        offset += size
    header_bytes = json.dumps(header, separators=(",", ":")).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)
    with file.open("wb") as stream:
        stream.write(len(header_bytes).to_bytes(8, "little") + header_bytes)
        for entry in entries.values():
            tensor = entry.make().contiguous()
            stream.write(tensor.flatten().view(torch.uint8).numpy().data)
            if progress is not None:
                progress.advance(entry.num_bytes)


def save_sharded(folder: Path, entries: dict[str, TensorEntry], max_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes `model.safetensors` or, where the tensors exceed `max_bytes`, several files and their index, named as in
    transformers. Shows its progress."""
    shards: list[dict[str, TensorEntry]] = [{}]
    size = total = 0
    for name, entry in entries.items():
        if shards[-1] and size + entry.num_bytes > max_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = entry
        size += entry.num_bytes
        total += entry.num_bytes
    names = [shard_name(number, len(shards)) for number in range(1, len(shards) + 1)]
    with Progress("writing weights", total) as progress:
        for file, shard in zip(names, shards, strict=True):
            save_streamed(folder / file, shard, progress)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def shard_name(number: int, count: int) -> str:
    """Returns the name of file `number` of `count`, counted from 1."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"
