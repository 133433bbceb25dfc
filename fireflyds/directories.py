"""Files and directories are whole or absent: written under another name and renamed when done."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fireflyds.errors import UserError


@contextlib.contextmanager
def build_aside(out: Path, *, marker: str, pieces: str) -> Iterator[Path]:
    """As `write_aside`, but what stands in its folder `pieces` outlives a failure, and the next attempt finds it.

    Raises:
        UserError: the place cannot be written, or holds other things.
    """
    out = out.resolve()
    aside = out.with_name(f".{out.name}.partial")
    _refuse_foreign(out, marker)
    try:
        (aside / pieces).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror}). Give another folder") from error
    try:
        yield aside
        _replace(out, aside)
    finally:
        if aside.exists() and not any((aside / pieces).iterdir()):
            shutil.rmtree(aside, ignore_errors=True)


def _refuse_foreign(out: Path, marker: str) -> None:
    if out.is_file():
        raise UserError(f"out={out}: cannot be written (a file of that name is there). Give another folder")
    if out.exists() and any(out.iterdir()) and not (out / marker).exists():
        raise UserError(
            f"out={out}: the folder holds other things (no {marker}) and is not overwritten. Give another folder"
        )


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
    aside = out.with_name(f".{out.name}.partial")
    _refuse_foreign(out, marker)
    try:
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror}). Give another folder") from error
    try:
        yield aside
        _replace(out, aside)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file aside, then rename it into place."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
