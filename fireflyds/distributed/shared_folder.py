"""Whether every rank sees the same folder of runs: rank 0 writes a file there and the others read it."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fireflyds.distributed.timeouts import run_with_timeout


def existing_part(runs: str) -> Path:
    """The folder of runs, or as much of its path as exists already."""
    folder = Path(runs).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.resolve()


@contextlib.contextmanager
def token_file(folder: Path) -> Iterator[dict[str, str]]:
    """A file with a secret in the folder, removed in the end. Yields what the other ranks need to find and know it."""
    token = secrets.token_hex(8)
    file = folder / f".fireflyds-doctor-{token}"
    try:
        file.write_text(token)
        with file.open() as stream:
            os.fsync(stream.fileno())
        yield {"place": str(folder), "file": file.name, "token": token}
    finally:
        file.unlink(missing_ok=True)


def read_token(runs: str, timeout: float, request: Any) -> dict[str, Any]:
    """Where this rank looks for the runs, and after how many seconds it read rank 0's file there; None: not within
    `timeout` seconds, and `why`."""
    return run_with_timeout(timeout + 5, lambda: _read_token(runs, timeout, request))


def _read_token(runs: str, timeout: float, request: Any) -> dict[str, Any]:
    folder, started = existing_part(runs), time.perf_counter()
    why = "it is not there"
    while True:
        waited = time.perf_counter() - started
        try:
            # Listing the folder makes network file systems look again.
            os.listdir(folder)
            if (folder / request["file"]).read_text() == request["token"]:
                return {"place": str(folder), "seconds": waited, "why": ""}
            why = "it is empty or another"
        except FileNotFoundError:
            pass
        except OSError as error:
            why = str(error.strerror)
        if waited > timeout:
            return {"place": str(folder), "seconds": None, "why": why}
        time.sleep(0.05)


REMEDY = "give runs=<a folder that every host mounts>, as an absolute path, and start all ranks in the same folder"


def describe_blind_ranks(answers: list[dict[str, Any]], hosts: list[str], runs: str) -> str:
    """Who did not see rank 0's file, and why; empty where all did. `answers` of `read_token` and `hosts`, by rank."""
    blind = [rank for rank, answer in enumerate(answers) if answer.get("seconds") is None]
    if not blind:
        return ""
    folder, first = answers[0].get("place", runs), answers[blind[0]]
    names = ", ".join(sorted({hosts[rank] for rank in blind})[:4])
    text = f"{folder}: rank 0's file is not seen by rank {', '.join(map(str, blind[:8]))} (on {names})"
    elsewhere = first.get("place", folder)
    return text + (
        f", who look in {elsewhere}" if elsewhere != folder else f": {first.get('why') or first.get('error')}"
    )
