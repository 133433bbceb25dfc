"""Atomic files and directories: written under a temporary name and renamed when complete."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from fireflyds.errors import UserError

MARKER = ".fireflyds.json"
"""Marker file of a finished output folder: records fireflyds as its writer, its kind and its files."""
PARTIAL = ".fireflyds.partial"
"""Marker file of a folder that is not yet complete."""


def read_json(file: Path) -> dict[str, Any]:
    """Returns the object in a JSON file.

    Raises:
        UserError: the file cannot be read, is not valid JSON, or does not contain an object.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"cannot be read as JSON ({error})", key=file, remedy="Repair the file, or get it again"
        ) from error
    if not isinstance(document, dict):
        raise UserError(
            f"an object was expected, found a {type(document).__name__}", key=file, remedy="Get the file again"
        )
    return document


def plain_file_name(name: Any, source: Path) -> str:
    """Validates `name`, read from the file `source`, before it is joined to a folder. Returns `name`.

    Raises:
        UserError: `name` is not a plain file name, so the joined path could be outside the folder.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or {"\\", "\0"} & set(name):
        raise UserError(
            f"names the file {name!r}, which is no plain file name and could be outside the folder",
            key=source,
            remedy="Correct the file, or get it again",
        )
    return name


def refuse_inputs_inside(out: Path, **inputs: str) -> None:
    """Raises `UserError` where `out`, which will be replaced, is or contains one of the named inputs."""
    out = out.resolve()
    for name, path in inputs.items():
        resolved = Path(path).resolve() if path and not any(c in path for c in "*?[") else None
        if resolved is not None and (resolved == out or out in resolved.parents):
            raise UserError(
                f"{name}={path} is in this folder and would be replaced",
                key="out",
                value=out,
                remedy="Give another folder",
            )


def lock_file(file: Path, busy: UserError | None) -> IO[str]:
    """Locks `file` until the returned stream is closed. `busy` None: blocks until another process releases the lock.

    Raises:
        UserError: another process holds the lock; the error is `busy`.
        OSError: the file cannot be opened.
    """
    while True:
        lock = file.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (fcntl.LOCK_NB if busy else 0))
            # The previous holder may have removed the file between open() and flock().
            if os.path.samestat(file.stat(), os.fstat(lock.fileno())):
                return lock
        except BlockingIOError as error:
            lock.close()
            raise busy or error from error
        except FileNotFoundError:
            pass
        lock.close()


@contextlib.contextmanager
def _exclusive_writer(out: Path, key: str) -> Iterator[None]:
    """Locks `out`, the value of `key`, against a second process that writes the same folder."""
    file = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        remedy = "Wait for it, or give another folder"
        lock = lock_file(file, UserError("another process writes there now", key=key, value=out, remedy=remedy))
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or "it is not a valid path of a folder"
        raise UserError(f"cannot be written ({reason})", key=key, value=out, remedy="Give another folder") from error
    with lock:
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Output:
    """An output folder of a command: its `kind`, and the top-level `caches` that later commands write into it.

    A finished folder contains `MARKER`, which records the kind and all written files. Only a folder with such a marker
    is replaced, and only its listed files and caches: other files are kept.
    """

    kind: str
    caches: tuple[str, ...] = ()
    key: str = "out"
    """The key of the command that names the folder, for errors."""

    def sign(self, folder: Path) -> None:
        """Writes the marker, which lists all files currently in `folder`."""
        files = sorted(str(path.relative_to(folder)) for path in _files(folder))
        files = [name for name in files if name not in (MARKER, PARTIAL)]
        content = {"written_by": "fireflyds", "kind": self.kind, "files": files}
        (folder / MARKER).write_text(json.dumps(content, indent=0, ensure_ascii=False), encoding="utf-8")

    def foreign_files(self, folder: Path) -> list[Path]:
        """Returns the files of a finished folder that this output did not write, as relative paths.

        Raises:
            UserError: the folder is not empty and is not an output of this kind.
        """
        present = list(_files(folder)) if folder.exists() else []
        if not present:
            return []
        try:
            content = read_json(folder / MARKER)
            written = {*content["files"], MARKER} if content["written_by"] == "fireflyds" else set()
            kind = content["kind"]
        except (UserError, KeyError, TypeError):
            written, kind = set(), ""
        if not written:
            raise UserError(
                f"the folder holds other things (no {MARKER} of fireflyds) and is not overwritten",
                key=self.key,
                value=folder,
                remedy="Give another folder",
            )
        if kind != self.kind:
            raise UserError(
                f"the folder holds the output of {kind}, not {self.kind}",
                key=self.key,
                value=folder,
                remedy="Give another folder",
            )
        names = (path.relative_to(folder) for path in present)
        return [name for name in names if str(name) not in written and name.parts[0] not in self.caches]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def remove_empty_folders(folder: Path) -> None:
    """Removes all folders without files, including `folder` itself."""
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def resumable_dir(out: Path, output: Output, *, pieces: str) -> Iterator[Path]:
    """Like `atomic_dir`, but the contents of the subfolder `pieces` are kept after a failure for the next attempt.

    Raises:
        UserError: the folder cannot be written, or contains other files.
    """
    out = out.resolve()
    with _exclusive_writer(out, output.key):
        staging = _prepare_staging(out, output, fresh=False)
        (staging / pieces).mkdir(exist_ok=True)
        try:
            yield staging
            _replace(out, staging, output)
        finally:
            if staging.exists() and not any((staging / pieces).iterdir()):
                shutil.rmtree(staging, ignore_errors=True)


@contextlib.contextmanager
def atomic_dir(out: Path, output: Output) -> Iterator[Path]:
    """Yields an empty sibling folder to write into; it replaces `out` on success and is removed on failure.

    Raises:
        UserError: the folder cannot be written, or contains other files.
    """
    out = out.resolve()
    with _exclusive_writer(out, output.key):
        staging = _prepare_staging(out, output, fresh=True)
        try:
            yield staging
            _replace(out, staging, output)
        finally:
            shutil.rmtree(staging, ignore_errors=True)


def _prepare_staging(out: Path, output: Output, *, fresh: bool) -> Path:
    """Creates the sibling folder to write into, after checking that `out` may be replaced."""
    if out.is_file():
        raise UserError(
            "cannot be written (a file of that name is there)", key=output.key, value=out, remedy="Give another folder"
        )
    staging, old = (out.with_name(f".{out.name}.{suffix}") for suffix in ("partial", "old"))
    if old.exists() and not out.exists():  # a replacement was interrupted between its two renames
        old.rename(out)
    output.foreign_files(out)
    is_ours = any((staging / name).exists() for name in (PARTIAL, MARKER))
    if staging.exists() and any(staging.iterdir()) and not is_ours:
        raise UserError(
            f"{staging} holds other things and is not overwritten",
            key=output.key,
            value=out,
            remedy="Move it, or give another folder",
        )
    try:
        if fresh:
            shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True, exist_ok=not fresh)
        (staging / PARTIAL).touch()
    except OSError as error:
        raise UserError(
            f"cannot be written ({error.strerror})", key=output.key, value=out, remedy="Give another folder"
        ) from error
    return staging


def _replace(out: Path, staging: Path, output: Output) -> None:
    foreign = output.foreign_files(out)
    for name in foreign:
        if (staging / name).exists():
            raise UserError(
                f"{name} was not written by fireflyds and would be replaced",
                key=output.key,
                value=out,
                remedy="Move it elsewhere",
            )
    # Signed first: a folder left by a kill between these two lines is still recognised.
    output.sign(staging)
    (staging / PARTIAL).unlink()
    # On the disk before the rename: after a power failure a complete folder must not hold empty files.
    for path in [*staging.rglob("*"), staging]:
        if not path.is_symlink():
            fsync(path)
    if not out.exists():
        staging.rename(out)
        fsync(out.parent)
        return
    for name in foreign:
        (staging / name).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(out / name, staging / name)
    old = out.with_name(f".{out.name}.old")
    if old.exists():
        output.foreign_files(old)  # raises unless it is left over from an earlier replacement
        shutil.rmtree(old)
    out.rename(old)
    staging.rename(out)
    fsync(out.parent)
    shutil.rmtree(old)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def atomic_write_text(path: Path, text: str) -> None:
    """Writes a text file atomically: to a temporary file, which is synced to disk and renamed."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    fsync(partial)
    os.replace(partial, path)


def fsync(path: Path) -> None:
    """Flushes a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
