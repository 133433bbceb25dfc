"""Files and directories are whole or absent: written under another name and renamed when done."""

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fireflyds.errors import UserError


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


def refuse_inputs_inside(out: Path, **inputs: str) -> None:
    """Raises `UserError` when `out`, which will be replaced, is or holds one of the named inputs."""
    out = out.resolve()
    for name, path in inputs.items():
        place = Path(path).resolve() if path and not any(c in path for c in "*?[") else None
        if place is not None and (place == out or out in place.parents):
            raise UserError(f"out={out}: {name}={path} stands there and would be replaced. Give another folder")


@contextlib.contextmanager
def _only_writer(out: Path) -> Iterator[None]:
    """Keep a second process out of the same place."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        lock = out.with_name(f".{out.name}.lock").open("w")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no place for a folder"
        raise UserError(f"out={out}: cannot be written ({reason}). Give another folder") from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"out={out}: another process writes there now. Wait for it, or give another folder"
            ) from error
        try:
            yield
        finally:
            Path(lock.name).unlink(missing_ok=True)


@contextlib.contextmanager
def build_aside(out: Path, *, marker: str, pieces: str) -> Iterator[Path]:
    """As `write_aside`, but what stands in its folder `pieces` outlives a failure, and the next attempt finds it.

    Raises:
        UserError: the place cannot be written, or holds other things.
    """
    out = out.resolve()
    with _only_writer(out):
        yield from _built(out, marker, pieces)


def _built(out: Path, marker: str, pieces: str) -> Iterator[Path]:
    aside = _place_aside(out, marker, fresh=False)
    (aside / pieces).mkdir(exist_ok=True)
    try:
        yield aside
        _replace(out, aside)
    finally:
        if aside.exists() and not any((aside / pieces).iterdir()):
            shutil.rmtree(aside, ignore_errors=True)


def _place_aside(out: Path, marker: str, *, fresh: bool) -> Path:
    """The sibling folder to write into, when `out` may be replaced."""
    if out.is_file():
        raise UserError(f"out={out}: cannot be written (a file of that name is there). Give another folder")
    if out.exists() and any(out.iterdir()) and not (out / marker).exists():
        raise UserError(
            f"out={out}: the folder holds other things (no {marker}) and is not overwritten. Give another folder"
        )
    aside = out.with_name(f".{out.name}.partial")
    try:
        if fresh:
            shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True, exist_ok=not fresh)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror}). Give another folder") from error
    return aside


def _replace(out: Path, aside: Path) -> None:
    if not out.exists():
        aside.rename(out)
        return
    old = out.with_name(f".{out.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    out.rename(old)
    aside.rename(out)
    shutil.rmtree(old)


@contextlib.contextmanager
def write_aside(out: Path, *, marker: str) -> Iterator[Path]:
    """Yield a fresh sibling folder to write into; on success it takes the place of `out`, on failure it goes.

    `marker` is a file that every output of this kind has: an existing folder without it is somebody else's.

    Raises:
        UserError: the place cannot be written, or holds other things.
    """
    out = out.resolve()
    with _only_writer(out):
        yield from _written(out, marker)


def _written(out: Path, marker: str) -> Iterator[Path]:
    aside = _place_aside(out, marker, fresh=True)
    try:
        yield aside
        _replace(out, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file aside, on the disk, then rename it into place."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    sync(aside)
    os.replace(aside, path)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
