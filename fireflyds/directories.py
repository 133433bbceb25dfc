"""Files and directories are whole or absent: written under another name and renamed when done."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fireflyds.errors import UserError


@contextlib.contextmanager
def write_aside(out: Path, *, marker: str) -> Iterator[Path]:
    """Yield a fresh sibling folder to write into; on success it takes the place of `out`, on failure it goes.

    `marker` is a file that every output of this kind has: an existing folder without it is somebody else's.

    Raises:
        UserError: the place cannot be written, or holds other things.
    """
    out = out.resolve()
    aside = out.with_name(f".{out.name}.partial")
    try:
        if out.is_file():
            raise NotADirectoryError(20, "a file of that name is there", str(out))
        if out.exists() and any(out.iterdir()) and not (out / marker).exists():
            raise UserError(
                f"out={out}: the folder holds other things (no {marker}) and is not overwritten. Give another folder"
            )
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"out={out}: cannot be written ({error.strerror}). Give another folder") from error
    try:
        yield aside
        if out.exists():
            old = out.with_name(f".{out.name}.old")
            shutil.rmtree(old, ignore_errors=True)
            out.rename(old)
            aside.rename(out)
            shutil.rmtree(old)
        else:
            aside.rename(out)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_whole(path: Path, text: str) -> None:
    """Write a text file aside, then rename it into place."""
    aside = path.with_name(f".{path.name}.partial")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)
