"""The run directory: what was asked (`config.yaml`), with what (`provenance.json`), and by whom it may be resumed."""

import hashlib
import json
import math
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

import fireflyds
from fireflyds.config import Precision, TrainConfig
from fireflyds.data.mix import RowSequence
from fireflyds.data.store import TokenStore
from fireflyds.directories import lock_file, read_json, write_whole
from fireflyds.engine import groups
from fireflyds.engine.changes import differences, has_begun, refuse_changes
from fireflyds.errors import UserError
from fireflyds.runs import layout
from fireflyds.types import TrainState


def open_run(config: TrainConfig, yaml_text: str, inputs: dict[str, Any]) -> IO[str]:
    """Make the run directory, or check that the one there is the same run. On rank 0 only.

    `inputs` says what the run reads (the store's and the base's contents), which must be the same on resuming.
    Returns the lock that keeps a second process out for as long as it is open.

    Raises:
        UserError: another process trains the run; or the name is taken by a run with another configuration or
            other inputs, and the message lists the differences.
    """
    run_dir = Path(config.run_dir)
    file = run_dir / "config.yaml"
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        busy = f"run={config.run}: another process trains {run_dir} now. Wait for it, end it, or give another run="
        lock = lock_file(run_dir / ".lock", busy)
    except OSError as error:
        raise UserError(
            f"run={config.run}: {run_dir} cannot be written ({error.strerror}). Give another run= or runs="
        ) from error
    if file.exists() and has_begun(run_dir):
        other = differences(read_json(run_dir / layout.INPUTS), inputs)
        refuse_changes(run_dir, yaml_text, config.run, other)
        write_whole(file, yaml_text)
        return lock
    # A start that was refused before its first step leaves the name free.
    shutil.rmtree(run_dir / layout.START, ignore_errors=True)
    write_whole(run_dir / "provenance.json", json.dumps(provenance(), indent=2))
    write_whole(run_dir / layout.INPUTS, json.dumps(inputs, indent=2))
    write_whole(file, yaml_text)
    return lock


def contents_of(folder: Path) -> str:
    """A hash of a model's weights: every file's name, size, first and last MiB, and of safetensors the last row of every
    tensor, where rows that were added end."""
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


def _last_rows(file: Path) -> Iterator[bytes]:
    try:
        with safe_open(file, "pt") as tensors:
            for name in sorted(tensors.keys()):
                piece = tensors.get_slice(name)
                row = piece[-1:] if piece.get_shape() else tensors.get_tensor(name)
                yield row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    except SafetensorError as error:
        raise UserError(f"{file}: cannot be read as safetensors ({error}). Get the file again") from error


def read_inputs(run_dir: Path) -> dict[str, Any]:
    """What a run recorded of the things it reads.

    Raises:
        UserError: the record is missing, damaged, or of another version of fireflyds.
    """
    recorded = read_json(run_dir / layout.INPUTS)
    if missing := {"base", "tokenizer", "vocab_size", "store", "template", "languages"} - recorded.keys():
        raise UserError(
            f"{run_dir / layout.INPUTS}: has no {min(missing)}. The file was edited or written by another version: restore it, or "
            "train again under another run="
        )
    return recorded


def require_base(run: str, path: str, recorded: dict[str, Any]) -> None:
    """Raises `UserError` unless the base of a run, where it has one, is what it was when the run began."""
    if not path:
        return
    remedy = "Restore the base, or train again under another run="
    if not (Path(path) / "config.json").is_file():
        raise UserError(f"run={run}: its base model.path={path} is gone (no config.json there). {remedy}")
    if contents_of(Path(path)) != recorded["base"]:
        raise UserError(f"run={run}: its base model.path={path} has changed since. {remedy}")


def identity(config: TrainConfig, tokenizer: str, vocab_size: int) -> dict[str, Any]:
    """What everything learnt belongs to: the base's weights, the tokenizer (both as hashes) and the vocabulary's size."""
    base = contents_of(Path(config.model.path)) if config.model.path else None
    return {"base": base, "tokenizer": tokenizer, "vocab_size": vocab_size}


def inputs(store: TokenStore) -> dict[str, Any]:
    """What else the run reads, by contents."""
    made_from = json.dumps(store.manifest["made_from"], sort_keys=True)
    return {
        "store": hashlib.sha256(made_from.encode()).hexdigest(),
        "template": store.manifest["template"],
        "languages": sorted({store.languages[index] for index in np.unique(store.language_ids)} - {""}),
    }


def total_steps(config: TrainConfig, rows: RowSequence) -> int:
    """Optimizer steps of the run.

    Raises:
        UserError: the data does not last that long.
    """
    asked = config.optim
    steps = asked.steps or math.ceil((asked.epochs or 0) * rows.rows_per_epoch / config.global_batch_size)
    rows.require(steps * config.global_batch_size)
    return steps


def describe(
    config: TrainConfig,
    model: Any,
    store: TokenStore,
    rows: RowSequence,
    steps: int,
    world: int,
    accumulation: int,
    precision: Precision,
) -> str:
    """What is about to happen, in two lines and a table."""
    table = groups.rows_of_table(model, config, precision)
    total = sum(row.parameters for row in table)
    trainable = total - table[-1].parameters
    truncated, dropped = rows.lost_to_length
    lost = (
        f", {truncated} dialogues shortened and {dropped} left out for seq_len={config.seq_len}"
        if truncated or dropped
        else ""
    )
    mixed = [name for name in rows.names if name != "all"]
    if mixed and (unmixed := sorted(set(store.domains) - set(mixed))):
        lost += f"; without weight, so not trained on: {', '.join(unmixed)}"
    return (
        f"{config.run}: {config.tuning.method.name}, {trainable:,} of {total:,} parameters train, ZeRO-{config.zero.stage}, {precision.name}\n"
        f"{len(store):,} documents, {store.num_tokens:,} tokens, {rows.rows_per_epoch:,} rows an epoch{lost}; {steps:,} steps of "
        f"{config.global_batch_size} rows = {world} ranks x {config.micro_batch_size} x {accumulation} accumulated\n"
        f"{groups.table(table)}"
    )


def begins(state: TrainState, steps: int) -> str:
    """Where a run takes up its work."""
    if not state.step:
        return f"starts at the first of {steps} steps"
    rest = "" if state.step < steps else "; nothing left to do"
    return f"resumed at step {state.step} of {steps} ({state.tokens:,} tokens){rest}"


def _version(name: str) -> str | None:
    """Of an installed distribution; a source checkout of fireflyds that is on the path need not be installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return fireflyds.__version__ if name == "fireflyds" else None


def provenance() -> dict[str, Any]:
    """The command, the code and the libraries."""
    libraries = ("fireflyds", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "sentencepiece", "numpy")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": git.stdout.strip() or None,
        "libraries": {name: _version(name) for name in libraries},
    }
