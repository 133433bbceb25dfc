"""Storage of checkpoints: the file-system operations that this package uses."""

import hashlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from fireflyds.fs import atomic_write_text, fsync
from fireflyds.runs import layout


class CheckpointStorage(Protocol):
    """Checkpoints by name (`step-000100`). Those that `list` returns are complete; all other folders are ignored."""

    @property
    def location(self) -> str:
        """Where the checkpoints are, for messages."""

    def list(self) -> list[str]:
        """Names of the complete checkpoints, sorted by step."""

    def open(self, name: str) -> Path:
        """A local folder to read the checkpoint from."""

    def staging(self, name: str) -> Path:
        """The local folder that a checkpoint is written to before it is committed."""

    def begin(self, name: str) -> None:
        """On rank 0: create an empty staging folder."""

    def commit(self, name: str) -> None:
        """On rank 0: atomically make the staging folder the newest checkpoint."""

    def remove(self, name: str) -> None:
        """On rank 0: remove a checkpoint. An interrupted removal leaves nothing that `list` returns."""

    def remove_leftovers(self) -> None:
        """On rank 0: remove the incomplete folders of a killed process."""

    def free_bytes(self) -> int:
        """Free disk space, in bytes."""


class LocalStorage:
    """Checkpoints in `<run>/checkpoints`, a folder that all ranks share."""

    def __init__(self, run_dir: Path) -> None:
        self.folder = run_dir / layout.CHECKPOINTS

    @property
    def location(self) -> str:
        """The folder of all checkpoints."""
        return str(self.folder)

    def list(self) -> list[str]:
        """Names of the complete checkpoints, by ascending step."""
        names = [path.name for path in self.folder.glob(f"{layout.STEP_PREFIX}*")]
        # Other names, such as `step-000100.bak`, are copies that users made.
        return sorted((name for name in names if name.removeprefix(layout.STEP_PREFIX).isdecimal()), key=step_of)

    def open(self, name: str) -> Path:
        """Folder of a complete checkpoint."""
        return self.folder / name

    def staging(self, name: str) -> Path:
        """Folder in which a checkpoint is written before `commit`."""
        return self.folder / f".{name}.partial"

    def begin(self, name: str) -> None:
        """Creates the empty staging folder, in place of an earlier one."""
        shutil.rmtree(self.staging(name), ignore_errors=True)
        self.staging(name).mkdir(parents=True)

    def commit(self, name: str) -> None:
        """Moves the staging folder to its final name, and writes that name to `latest`."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        self.staging(name).rename(folder)
        fsync(self.folder)
        atomic_write_text(self.folder / layout.LATEST, f"{name}\n")

    def remove(self, name: str) -> None:
        """Renames the checkpoint, then deletes it."""
        # Removal takes time: what an interrupted one leaves must not look like a complete checkpoint.
        removed = self.folder / f".{name}.dropped"
        (self.folder / name).rename(removed)
        shutil.rmtree(removed, ignore_errors=True)

    def remove_leftovers(self) -> None:
        """Deletes incomplete folders, of interrupted saves and of interrupted removals."""
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in [*self.folder.glob(".*.partial"), *self.folder.glob(".*.dropped")]:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def free_bytes(self) -> int:
        """Free space of the file system, in bytes."""
        return shutil.disk_usage(self.folder).free


def storage_of(run_dir: Path) -> CheckpointStorage:
    """The storage of a run's checkpoints."""
    return LocalStorage(run_dir)


def step_of(name: str) -> int:
    """The step in the name of a checkpoint."""
    return int(name.removeprefix(layout.STEP_PREFIX))


def files_in(folder: Path) -> Iterator[Path]:
    """All files of a checkpoint, sorted by path."""
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def num_bytes_of(folder: Path) -> int:
    """Total size of the files of a checkpoint, in bytes."""
    return sum(file.stat().st_size for file in files_in(folder))


def sha256_of(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's content."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
