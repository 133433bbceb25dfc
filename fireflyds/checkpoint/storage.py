"""Where checkpoints are kept: all that the rest of this room asks of a file system."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from fireflyds.fs import atomic_write_text, fsync
from fireflyds.runs import layout


class CheckpointStorage(Protocol):
    """Checkpoints by name (`step-000100`). What `list` names is whole; everything else does not count."""

    def list(self) -> list[str]:
        """Whole checkpoints, by step."""

    def open(self, name: str) -> Path:
        """A local folder to read the checkpoint from."""

    def staging(self, name: str) -> Path:
        """The local folder that a checkpoint is written to before it is committed."""

    def begin(self, name: str) -> None:
        """On rank 0: make the staging folder, empty."""

    def commit(self, name: str) -> None:
        """On rank 0: what is in the staging folder becomes the newest checkpoint, all at once."""

    def remove(self, name: str) -> None:
        """On rank 0. A removal that is cut short leaves nothing that looks whole."""

    def remove_leftovers(self) -> None:
        """On rank 0: what a killed process left."""

    def free_bytes(self) -> int:
        """Room for further checkpoints."""


class LocalStorage:
    """A folder that all ranks see: `<run>/checkpoints`."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / layout.CHECKPOINTS

    def list(self) -> list[str]:
        names = [path.name for path in self.folder.glob(f"{layout.STEP_PREFIX}*")]
        # A copy such as `step-000100.bak` is a person's own.
        return sorted((name for name in names if name.removeprefix(layout.STEP_PREFIX).isdecimal()), key=step_of)

    def open(self, name: str) -> Path:
        return self.folder / name

    def staging(self, name: str) -> Path:
        return self.folder / f".{name}.partial"

    def begin(self, name: str) -> None:
        shutil.rmtree(self.staging(name), ignore_errors=True)
        self.staging(name).mkdir(parents=True)

    def commit(self, name: str) -> None:
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        self.staging(name).rename(folder)
        fsync(self.folder)
        atomic_write_text(self.folder / layout.LATEST, f"{name}\n")

    def remove(self, name: str) -> None:
        # Removing takes a while; what is left of a removal that was cut short must not look whole.
        removed = self.folder / f".{name}.dropped"
        (self.folder / name).rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def remove_leftovers(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [*self.folder.glob(".*.partial"), *self.folder.glob(".*.dropped")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def free_bytes(self) -> int:
        return shutil.disk_usage(self.folder).free


def step_of(name: str) -> int:
    """The step of a checkpoint's name."""
    return int(name.removeprefix(layout.STEP_PREFIX))


def files_in(folder: Path) -> Iterator[Path]:
    """All files of a checkpoint, in the order of their names."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def num_bytes_of(folder: Path) -> int:
    return sum(file.stat().st_size for file in files_in(folder))


def sha256_of(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
