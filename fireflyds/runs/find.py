"""Lookup of runs by name. Imports nothing heavy, so that an unknown name raises quickly."""

import difflib
from pathlib import Path

from fireflyds.errors import UserError
from fireflyds.runs import layout


def find_run(runs: str, key: str, name: str) -> Path:
    """Returns the folder of a run.

    Raises:
        UserError: there is no such run; the message lists existing runs with similar names.
    """
    folder = Path(runs) / name
    if not (folder / layout.CONFIG).is_file():
        names = sorted(str(path.parent.relative_to(runs)) for path in Path(runs).glob(f"**/{layout.CONFIG}"))
        similar = difflib.get_close_matches(name, names, n=5, cutoff=0.3) or names[:5]
        hint = (
            f"Similar: {', '.join(similar)} (of {len(names)})"
            if len(names) > 5
            else f"Known: {', '.join(names) or 'none'}"
        )
        raise UserError(f"no such run in {runs}", key=key, value=name, remedy=hint)
    return folder
