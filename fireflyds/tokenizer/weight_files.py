"""Reads the weights of a Hugging Face model file by file: safetensors or PyTorch's format."""

import pickle
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fireflyds.errors import UserError
from fireflyds.tokenizer.shards import shard_names

Reader = Callable[[], Iterator[tuple[str, torch.Tensor]]]


def weight_readers(base: Path) -> list[tuple[str, Reader]]:
    """Returns the weight files (from the index if there is one), each with a reader; safetensors take precedence.

    Raises:
        UserError: there are no weights, or a file of the index is missing.
    """
    for stem, suffix, read in (("model", ".safetensors", _read_safetensors), ("pytorch_model", ".bin", _read_pytorch)):
        index = base / f"{stem}{suffix}.index.json"
        if index.is_file():
            names = shard_names(index)
        else:
            whole = f"{stem}{suffix}"
            names = [whole] if (base / whole).is_file() else sorted(file.name for file in base.glob(f"{stem}*{suffix}"))
        missing = [name for name in names if not (base / name).is_file()]
        if missing:
            raise UserError(
                f"{missing[0]} is missing, which {index.name} names",
                key="base",
                value=base,
                remedy="Get the file again",
            )
        if names:
            return [(name, partial(_read_checked, read, base / name)) for name in names]
    raise UserError(
        "no weights there (model*.safetensors or pytorch_model*.bin)",
        key="base",
        value=base,
        remedy="Give a complete model, or only its tokenizer (without config.json)",
    )


def _read_checked(
    read: Callable[[Path], Iterator[tuple[str, torch.Tensor]]], file: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        yield from read(file)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(
            f"cannot be read ({str(error).splitlines()[0]})", key=file, remedy="Get the file again"
        ) from error


def _read_safetensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, "pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118 - not a dict
            yield name, tensors.get_tensor(name)


def _read_pytorch(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    # Memory-mapped: tensors are loaded on use. Files in the format before PyTorch 1.6 (2020) cannot be mapped.
    can_mmap = zipfile.is_zipfile(file)
    yield from torch.load(file, map_location="cpu", mmap=can_mmap, weights_only=True).items()
