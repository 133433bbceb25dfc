"""Content hashes that identify the base model and the tokenizer of a run."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fireflyds.config import TrainConfig
from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.runs import layout


def weights_hash(folder: Path) -> str:
    """A hash of a model's weights: name, size, first and last MiB of every file, and for safetensors the last row of
    every tensor, because added vocabulary rows are the last ones."""
    digest = hashlib.sha256()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin"), folder / "config.json"]):
        digest.update(f"{file.name} {file.stat().st_size}".encode())
        with file.open("rb") as stream:
            digest.update(stream.read(1 << 20))
            stream.seek(-min(1 << 20, file.stat().st_size), os.SEEK_END)
            digest.update(stream.read())
        if file.suffix == ".safetensors":
            digest.update(b"".join(_last_rows(file)))
    return digest.hexdigest()


def read_safetensors_header(file: Path) -> tuple[int, dict[str, Any]]:
    """Returns the position of the data in a safetensors file, and its tensors by name.

    https://github.com/huggingface/safetensors, section Format: header length, header in JSON, tensors.

    Raises:
        UserError: it is not a safetensors file, or its length differs from its header, as of a partial download.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            start = 8 + int.from_bytes(stream.read(8), "little")
            if not 8 < start <= size:
                raise ValueError("it has no header")
            tensors = json.loads(stream.read(start - 8))
        tensors.pop("__metadata__", None)
        if start + max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0) != size:
            raise ValueError("its length differs from its header")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"cannot be read as safetensors ({error})", key=file, remedy="Get the file again") from error
    return start, tensors


def _last_rows(file: Path) -> Iterator[bytes]:
    """The bytes of the last row of every tensor of a safetensors file."""
    data, tensors = read_safetensors_header(file)
    with file.open("rb") as stream:
        for _, tensor in sorted(tensors.items()):
            start, end = tensor["data_offsets"]
            row_bytes = (end - start) // max(1, tensor["shape"][0] if tensor["shape"] else 1)
            stream.seek(data + end - row_bytes)
            yield stream.read(row_bytes)


def read_inputs(run_dir: Path) -> dict[str, Any]:
    """Returns the recorded identity of a run's inputs (`inputs.json`).

    Raises:
        UserError: the record is missing, damaged, or from another version of fireflyds.
    """
    recorded = read_json(run_dir / layout.INPUTS)
    if missing := {"base", "tokenizer", "vocab_size", "store", "template", "languages"} - recorded.keys():
        raise UserError(
            f"has no {min(missing)}",
            key=run_dir / layout.INPUTS,
            remedy="The file was edited or written by another version: restore it, or train again under another run=",
        )
    return recorded


def require_base(run: str, path: str, recorded: dict[str, Any]) -> None:
    """Raises `UserError` where the base model of a run is missing or has changed since the run was started."""
    if not path:
        return
    remedy = "Restore the base, or train again under another run="
    if not (Path(path) / "config.json").is_file():
        raise UserError(
            f"its base model.path={path} is gone (no config.json there)", key="run", value=run, remedy=remedy
        )
    if weights_hash(Path(path)) != recorded["base"]:
        raise UserError(f"its base model.path={path} has changed since", key="run", value=run, remedy=remedy)


def base_identity(config: TrainConfig, tokenizer: str, vocab_size: int) -> dict[str, Any]:
    """The base that trained weights belong to: hashes of its weights and tokenizer, and the vocabulary size."""
    base = weights_hash(Path(config.model.path)) if config.model.path else None
    return {"base": base, "tokenizer": tokenizer, "vocab_size": vocab_size}
