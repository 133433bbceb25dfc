"""Base model and token store on the host's own disk: copied there by one rank of the host, read from there by all."""

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

# Beside the weights: what loading a model may read.
_OF_MODEL = {".json", ".model", ".txt", ".jinja", ".safetensors"}
_WEIGHTS_BEFORE_SAFETENSORS = ".bin"


def stage_inputs(
    config: TrainConfig, base: str | None, store: TokenStore, log: Callable[[str], None]
) -> tuple[TrainConfig, TokenStore]:
    """The configuration and the store with paths on this host's disk; the same ones where none is asked for.

    `base` is the hash of the base's weights. All ranks call it; one that fails is named to all.

    Raises:
        UserError: on every rank: no space on a host, or a folder that cannot be written.
    """
    if not config.hardware.local_cache:
        return config, store
    cache, failure, here = Path(config.hardware.local_cache), "", config.model.path
    try:
        if base is not None:
            here = str(
                _copy_once(
                    cache, f"base-{base[:16]}", Path(config.model.path), model_files(Path(config.model.path)), log
                )
            )
        digest = hashlib.sha256((store.path / MANIFEST).read_bytes()).hexdigest()
        store = TokenStore(_copy_once(cache, f"store-{digest[:16]}", store.path, store_files(store), log))
    except OSError as error:
        failure = f"hardware.local_cache={cache}: {error}. Give a folder on every host's disk that can be written"
    except UserError as error:
        failure = str(error)
    failures: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(failures, failure and f"{os.uname().nodename}: {failure}")
    if found := [each for each in failures if each]:
        raise UserError(found[0])
    return dataclasses.replace(config, model=dataclasses.replace(config.model, path=here)), store


def model_files(folder: Path) -> dict[str, Path]:
    """By name: the files of a Hugging Face directory that loading reads. Old `.bin` weights only where they are all."""
    files = {file.name: file for file in sorted(folder.iterdir()) if file.is_file()}
    wanted = _OF_MODEL
    if not any(name.endswith(".safetensors") for name in files):
        wanted = _OF_MODEL | {_WEIGHTS_BEFORE_SAFETENSORS}
    return {name: file for name, file in files.items() if file.suffix in wanted}


def store_files(store: TokenStore) -> dict[str, Path]:
    """By name: the files of a store that training reads."""
    parts = [f"parts/{part['key']}.ids" for part in store.manifest["parts"]]
    names = [*parts, *(f"index/{name}.npy" for name in INDEX), MANIFEST]
    return {name: store.path / name for name in names}


def _copy_once(cache: Path, name: str, source: Path, files: dict[str, Path], log: Callable[[str], None]) -> Path:
    """The folder `name` in the cache, copied there by whoever comes first; it is whole or absent."""
    folder, aside = cache / name, cache / f".{name}.partial"
    cache.mkdir(parents=True, exist_ok=True)
    # Other ranks of this host wait here.
    with lock_file(cache / f".{name}.lock", "", wait=True):
        sizes = {relative: file.stat().st_size for relative, file in files.items()}
        if folder.is_dir() and sizes == {name: _size_or_missing(folder / name) for name in sizes}:
            log(f"{name} is read from {folder} (local_cache)")
            return folder
        for left in (aside, folder):
            shutil.rmtree(left, ignore_errors=True)
        size, free = sum(sizes.values()), shutil.disk_usage(cache).free
        if size > free:
            raise UserError(
                f"hardware.local_cache={cache}: {name} needs {size / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free. Remove "
                "what is no longer needed there, give a larger disk, or leave hardware.local_cache empty"
            )
        for relative, file in files.items():
            place = aside / relative
            place.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, place)
            fsync(place)
        aside.rename(folder)
        fsync(cache)
    log(f"{name} was copied from {source} to {folder} (local_cache, {size / 2**30:.2f} GiB) and is read from there")
    return folder


def _size_or_missing(file: Path) -> int:
    return file.stat().st_size if file.is_file() else -1
