"""Copies of base model and token store on a host's local disk: made by one rank of the host, read by all of them."""

import dataclasses
import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch.distributed as dist

from fireflyds.config import TrainConfig
from fireflyds.data.store.store import INDEX, MANIFEST, TokenStore
from fireflyds.errors import UserError
from fireflyds.fs import fsync, lock_file

# Suffixes of the files that loading a model may read.
_MODEL_SUFFIXES = {".json", ".model", ".txt", ".jinja", ".safetensors"}
_PICKLE_SUFFIX = ".bin"


def stage_inputs(
    config: TrainConfig, base: str | None, store: TokenStore, log: Callable[[str], None]
) -> tuple[TrainConfig, TokenStore]:
    """Copies base model and token store to `hardware.local_cache`; returns configuration and store with local paths.

    Both are returned unchanged if `hardware.local_cache` is empty. `base` is the hash of the base model's weights; the
    model is not copied if it is None. All ranks call it.

    Raises:
        UserError: on every rank: too little space on a host, or a folder that cannot be written.
    """
    if not config.hardware.local_cache:
        return config, store
    cache, model_path = Path(config.hardware.local_cache), config.model.path
    failure: UserError | None = None
    try:
        if base is not None:
            model_path = str(
                copy_once(
                    cache, f"base-{base[:16]}", Path(config.model.path), model_files(Path(config.model.path)), log
                )
            )
        digest = hashlib.sha256((store.path / MANIFEST).read_bytes()).hexdigest()
        store = TokenStore(copy_once(cache, f"store-{digest[:16]}", store.path, store_files(store), log))
    except OSError as error:
        remedy = "Give a folder on every host's disk that can be written"
        failure = UserError(str(error), key="hardware.local_cache", value=cache, remedy=remedy)
    except UserError as error:
        failure = error
    failures: list[UserError | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, failure and failure.within(os.uname().nodename))
    if first := next(filter(None, failures), None):
        raise first
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=model_path)), store


def model_files(folder: Path) -> dict[str, Path]:
    """By name: the files of a Hugging Face model that loading reads. `.bin` weights only without safetensors."""
    files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    suffixes = _MODEL_SUFFIXES
    if not any(name.endswith(".safetensors") for name in files):
        suffixes = _MODEL_SUFFIXES | {_PICKLE_SUFFIX}
    return {name: file for name, file in files.items() if file.suffix in suffixes}


def store_files(store: TokenStore) -> dict[str, Path]:
    """By path in the store: the files of a token store that training reads."""
    paths = [f"parts/{part['key']}.ids" for part in store.manifest["parts"]]
    names = [*paths, *(f"index/{name}.npy" for name in INDEX), MANIFEST]
    return {name: store.path / name for name in names}


def copy_once(cache: Path, name: str, source: Path, files: dict[str, Path], log: Callable[[str], None]) -> Path:
    """The folder `name` in the cache, copied by the first rank of the host to call; it is complete or absent."""
    folder, partial = cache / name, cache / f".{name}.partial"
    cache.mkdir(parents=True, exist_ok=True)
    # Other ranks of this host wait here.
    with lock_file(cache / f".{name}.lock", None):
        sizes = {relative: file.stat().st_size for relative, file in files.items()}
        if folder.is_dir() and sizes == {name: _size_or_missing(folder / name) for name in sizes}:
            log(f"{name} is read from {folder} (local_cache)")
            return folder
        for path in (partial, folder):
            shutil.rmtree(path, ignore_errors=True)
        size, free = sum(sizes.values()), shutil.disk_usage(cache).free
        if size > free:
            raise UserError(
                f"{name} needs {size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free",
                key="hardware.local_cache",
                value=cache,
                remedy="Remove files that are no longer needed, use a larger disk, or leave hardware.local_cache empty",
            )
        for relative, file in files.items():
            target = partial / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)
            fsync(target)
        partial.rename(folder)
        fsync(cache)
    log(f"{name} was copied from {source} to {folder} (local_cache, {size / 2**30:.2f} GiB) and is read from there")
    return folder


def _size_or_missing(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1
