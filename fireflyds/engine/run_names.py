"""Runs by name. Imports nothing heavy, so that a wrong name is told at once."""

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
        raise UserError(f"{key}={name}: no such run in {runs}. Known: {', '.join(known) or 'none'}")
    return folder
