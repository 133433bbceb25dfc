"""Test that every rank sees the same `runs` folder: rank 0 writes a file into it and the others read the file."""

import contextlib
import os
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fireflyds.distributed.timeouts import run_with_timeout


def existing_part(runs: str) -> Path:
    """The `runs` folder, or its nearest ancestor that exists; resolved."""
    folder = Path(runs).absolute()
    while not folder.exists():
        folder = folder.parent
    return folder.resolve()


@contextlib.contextmanager
def token_file(folder: Path) -> Iterator[dict[str, str]]:
    """A file with a random token in `folder`, removed on exit. Yields the request that `read_token` takes."""
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
    """Reads rank 0's token file from this rank's `runs` folder.

    Returns `place` (that folder), `seconds` until the token was read (None: not within `timeout` seconds), and `why`.
    """
    return run_with_timeout(timeout + 5, lambda: _read_token(runs, timeout, request))


def _read_token(runs: str, timeout: float, request: Any) -> dict[str, Any]:
    folder, started = existing_part(runs), time.perf_counter()
    reason = "the file does not exist"
    while True:
        waited = time.perf_counter() - started
        try:
            # Listing the folder makes network file systems refresh their caches.
            os.listdir(folder)
            if (folder / request["file"]).read_text() == request["token"]:
                return {"place": str(folder), "seconds": waited, "why": ""}
            reason = "the file has other content"
        except FileNotFoundError:
            pass
        except OSError as error:
            reason = str(error.strerror)
        if waited > timeout:
            return {"place": str(folder), "seconds": None, "why": reason}
        time.sleep(0.05)


REMEDY = "give runs=<a folder that every host mounts>, as an absolute path, and start all ranks in the same folder"


def describe_blind_ranks(answers: list[dict[str, Any]], hosts: list[str], runs: str) -> str:
    """A message about the ranks that did not see rank 0's file; empty if all did.

    `answers` (of `read_token`) and `hosts` are by rank.
    """
    failed_ranks = [rank for rank, answer in enumerate(answers) if answer.get("seconds") is None]
    if not failed_ranks:
        return ""
    folder, first_answer = answers[0].get("place", runs), answers[failed_ranks[0]]
    host_names = ", ".join(sorted({hosts[rank] for rank in failed_ranks})[:4])
    text = f"{folder}: rank 0's file is not seen by rank {', '.join(map(str, failed_ranks[:8]))} (on {host_names})"
    other_folder = first_answer.get("place", folder)
    if other_folder != folder:
        return f"{text}, whose runs folder is {other_folder}"
    return f"{text}: {first_answer.get('why') or first_answer.get('error')}"
