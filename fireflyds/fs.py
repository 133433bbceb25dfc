"""Files and directories are whole or absent: written under another name and renamed when done."""

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
"""In a finished output folder: that fireflyds wrote it, what it is, and the files it holds."""
PARTIAL = ".fireflyds.partial"
"""In a folder that is being written."""


def read_json(file: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        UserError: it cannot be read, is no JSON, or is something else than an object.
    """
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error}). Mend the file, or get it again") from error
    if not isinstance(document, dict):
        raise UserError(f"{file}: an object was expected, it holds a {type(document).__name__}. Get the file again")
    return document


def plain_file_name(name: Any, source: Path) -> str:
    """`name`, which stands in the file `source` and is to be joined to a folder.

    Raises:
        UserError: it is no plain file name, so that the joined path could lie outside the folder.
    """
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", "..") or {"\\", "\0"} & set(name):
        raise UserError(
            f"{source}: names the file {name!r}, which is no plain file name and could lie outside the folder. Correct "
            "the file, or get it again"
        )
    return name


def refuse_inputs_inside(out: Path, **inputs: str) -> None:
    """Raises `UserError` when `out`, which will be replaced, is or holds one of the named inputs."""
    out = out.resolve()
    for name, path in inputs.items():
        place = Path(path).resolve() if path and not any(c in path for c in "*?[") else None
        if place is not None and (place == out or out in place.parents):
            raise UserError(f"out={out}: {name}={path} stands there and would be replaced. Give another folder")


def lock_file(file: Path, busy: str, *, wait: bool = False) -> IO[str]:
    """A lock on `file`, held until what is returned is closed. `wait`: for another process to give it up.

    Raises:
        UserError: another process holds it; the message is `busy`.
        OSError: the file cannot be opened.
    """
    while True:
        lock = file.open("w")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            # Its holder may have removed the file between the opening and the locking.
            if os.path.samestat(file.stat(), os.fstat(lock.fileno())):
                return lock
        except BlockingIOError as error:
            lock.close()
            raise UserError(busy) from error
        except FileNotFoundError:
            pass
        lock.close()


@contextlib.contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Keep a second process out of the same place."""
    file = out.with_name(f".{out.name}.lock")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = lock_file(file, f"out={out}: another process writes there now. Wait for it, or give another folder")
    except (OSError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        reason = getattr(error, "strerror", None) or "it is no place for a folder"
        raise UserError(f"out={out}: cannot be written ({reason}). Give another folder") from error
    with lock:
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


@dataclass(frozen=True, slots=True)
class Output:
    """A folder that a verb writes: its `kind`, and the top-level `caches` that later verbs keep in it.

    A finished folder holds `MARKER`, which says the kind and lists every file that was written. Only a folder with such
    a marker is replaced, and of it only the listed files and the caches: any other file stays.
    """

    kind: str
    caches: tuple[str, ...] = ()

    def sign(self, folder: Path) -> None:
        """Write the marker over all files that are in `folder` now."""
        files = sorted(str(path.relative_to(folder)) for path in _files(folder))
        content = {"written_by": "fireflyds", "kind": self.kind, "files": [name for name in files if name != MARKER]}
        (folder / MARKER).write_text(json.dumps(content, indent=0, ensure_ascii=False), encoding="utf-8")

    def foreign_files(self, folder: Path) -> list[Path]:
        """Paths, relative to a finished folder, of the files in it that this output did not write.

        Raises:
            UserError: the folder is not empty and is no output of this kind.
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
                f"out={folder}: the folder holds other things (no {MARKER} of fireflyds) and is not overwritten. Give "
                "another folder"
            )
        if kind != self.kind:
            raise UserError(
                f"out={folder}: the folder holds the output of {kind}, not {self.kind}. Give another folder"
            )
        names = (path.relative_to(folder) for path in present)
        return [name for name in names if str(name) not in written and name.parts[0] not in self.caches]


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())


def remove_output(folder: Path) -> None:
    """Remove the files that a finished folder's marker lists; others stay, and so does a folder without a marker."""
    try:
        written = read_json(folder / MARKER)["files"]
    except (UserError, KeyError):
        return
    for name in [*written, MARKER]:
        file = folder / name
        if folder.resolve() in file.resolve().parents:
            file.unlink(missing_ok=True)
    remove_empty_folders(folder)


def remove_empty_folders(folder: Path) -> None:
    """Remove every folder in which no file is, `folder` itself too."""
    for path in sorted((path for path in folder.rglob("*") if path.is_dir()), reverse=True):
        with contextlib.suppress(OSError):
            path.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()


@contextlib.contextmanager
def resumable_dir(out: Path, output: Output, *, pieces: str) -> Iterator[Path]:
    """As `write_aside`, but what stands in its folder `pieces` outlives a failure, and the next attempt finds it.

    Raises:
        UserError: the place cannot be written, or holds other things.
    """
    out = out.resolve()
    with _only_writer(out):
        aside = _place_aside(out, output, fresh=False)
        (aside / pieces).mkdir(exist_ok=True)
        try:
            yield aside
            _replace(out, aside, output)
        finally:
            if aside.exists() and not any((aside / pieces).iterdir()):
                shutil.rmtree(aside, ignore_errors=True)


@contextlib.contextmanager
def atomic_dir(out: Path, output: Output) -> Iterator[Path]:
    """Yield a fresh sibling folder to write into; on success it takes the place of `out`, on failure it goes.

    Raises:
        UserError: the place cannot be written, or holds other things.
    """
    out = out.resolve()
    with _only_writer(out):
        aside = _place_aside(out, output, fresh=True)
        try:
            yield aside
            _replace(out, aside, output)
        finally:
            shutil.rmtree(aside, ignore_errors=True)


def _place_aside(out: Path, output: Output, *, fresh: bool) -> Path:
    """The sibling folder to write into, when `out` may be replaced."""
    if out.is_file():
        raise UserError(f"out={out}: cannot be written (a file of that name is there). Give another folder")
    aside, old = (out.with_name(f".{out.name}.{suffix}") for suffix in ("partial", "old"))
    if old.exists() and not out.exists():  # a replacement was cut short between its two renames
        old.rename(out)
    output.foreign_files(out)
    if (aside.exists() and any(aside.iterdir())) and not (aside / PARTIAL).exists():
        raise UserError(
            f"out={out}: {aside} holds other things and is not overwritten. Move it, or give another folder"
        )
    try:
        if fresh:
            shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True, exist_ok=not fresh)
        (aside / PARTIAL).touch()
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror}). Give another folder") from error
    return aside


def _replace(out: Path, aside: Path, output: Output) -> None:
    (aside / PARTIAL).unlink()
    output.sign(aside)
    if not out.exists():
        aside.rename(out)
        return
    for name in output.foreign_files(out):
        if (aside / name).exists():
            raise UserError(f"out={out}: {name} was not written by fireflyds and would be replaced. Move it elsewhere")
        (aside / name).parent.mkdir(parents=True, exist_ok=True)
        _link_or_copy(out / name, aside / name)
    old = out.with_name(f".{out.name}.old")
    if old.exists():
        output.foreign_files(old)  # refused where it is not what an earlier replacement left
        shutil.rmtree(old)
    out.rename(old)
    aside.rename(out)
    shutil.rmtree(old)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # a file system without hard links
        shutil.copy2(source, target, follow_symlinks=False)


def atomic_write_text(path: Path, text: str) -> None:
    """Write a text file aside, on the disk, then rename it into place."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    fsync(aside)
    os.replace(aside, path)


def fsync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
