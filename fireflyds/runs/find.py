"""Runs by name. Imports nothing heavy, so that a wrong name is told at once."""

import difflib
from pathlib import Path

from fireflyds.errors import UserError


def find_run(runs: str, key: str, name: str) -> Path:
    """The folder of a run.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    folder = Path(runs) / name
    if not (folder / "config.yaml").is_file():
        known = sorted(str(path.parent.relative_to(runs)) for path in Path(runs).glob("**/config.yaml"))
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.3) or known[:5]
        some = (
            f"Near it: {', '.join(near)} (of {len(known)})"
            if len(known) > 5
            else f"Known: {', '.join(known) or 'none'}"
        )
        raise UserError(f"{key}={name}: no such run in {runs}. {some}")
    return folder
