"""Preparation by several processes: process 0 plans and writes the index, all of them encode parts."""

import contextlib
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fireflyds.config import PrepareConfig
from fireflyds.data.read.records import FilePart
from fireflyds.data.store.build import make_shared_parts, reuse_parts
from fireflyds.data.store.parts import EncodeTask
from fireflyds.data.store.shared_work import POLL_SECONDS, Board, Claims, SharedPlace, job_of
from fireflyds.data.store.store import MANIFEST
from fireflyds.errors import UserError
from fireflyds.types import Encoder

# Planning reads every file once; the others wait for it as long as process 0 lives at all.
_START_SECONDS = 24 * 3600.0
_INDEX = "index"
_CLAIMS = "claims"


def board_of(out: Path) -> Board:
    """Returns the board of this start for the store `out`."""
    return Board(out, job_of(os.environ))


def lead(
    config: PrepareConfig,
    tasks: list[EncodeTask],
    load_encoder: Callable[[], Encoder],
    folder: Path,
    earlier: Path,
    made_from: dict[str, Any],
    size: int,
) -> list[dict[str, Any]]:
    """Process 0: writes what is to be made, makes its share, and returns the counts of all parts.

    Raises:
        UserError: a part was damaged while it was written.
    """
    _, missing = reuse_parts(tasks, folder / "parts", earlier, made_from)
    shutil.rmtree(folder / _CLAIMS, ignore_errors=True)
    with Claims(folder / _CLAIMS, config.lost_after_seconds) as claims:
        claims.take(_INDEX)
        board_of(Path(config.out or config.data.store)).write(
            "work",
            folder=str(folder),
            template=config.template,
            made_from=made_from,
            tasks=[asdict(task) for task in missing],
        )
        place = SharedPlace(0, size, claims)
        make_shared_parts(config, missing, load_encoder, folder / "parts", made_from, place)
        finished, damaged = reuse_parts(tasks, folder / "parts", earlier, made_from)
    shutil.rmtree(folder / _CLAIMS, ignore_errors=True)
    if damaged:
        raise UserError(
            f"{len(damaged):,} parts were damaged while they were written", key="out", remedy="Give the command again"
        )
    return [finished[task.key] for task in tasks]


def follow(config: PrepareConfig, out: Path, load_encoder: Callable[[], Encoder], rank: int, size: int) -> None:
    """Another process: waits for the plan, makes its share, and waits for the end.

    Raises:
        UserError: process 0 failed or was lost.
    """
    board = board_of(out)
    content = _wait_for_plan(board, out)
    if content is None or content["state"] == "done":
        return
    if content["state"] == "work":
        folder = Path(content["folder"])
        tasks = [EncodeTask(**{**task, "part": _part(task["part"])}) for task in content["tasks"]]
        config = replace(config, template=content["template"])
        with Claims(folder / _CLAIMS, config.lost_after_seconds) as claims:
            place = SharedPlace(rank, size, claims)
            # Process 0 may end between two looks at the parts, and moves their folder then.
            with contextlib.suppress(FileNotFoundError):
                make_shared_parts(config, tasks, load_encoder, folder / "parts", content["made_from"], place)
            while (content := board.read()) is not None and content["state"] == "work":
                if claims.is_lost(_INDEX):
                    raise UserError(
                        "process 0 was lost before it wrote the index; all parts are finished",
                        key="out",
                        value=out,
                        remedy="Give the command again",
                    )
                time.sleep(POLL_SECONDS)
    if content is not None and content["state"] == "failed":
        raise UserError("process 0 failed; its message says why", key="out", value=out, remedy="See its log")


def _part(fields: dict[str, Any]) -> FilePart:
    shard = fields["shard"] and tuple(fields["shard"])
    return FilePart(**{**fields, "shard": shard})


def _wait_for_plan(board: Board, out: Path) -> dict[str, Any] | None:
    """What process 0 wrote; None where it ended so early that only the finished store is left."""
    deadline = time.monotonic() + _START_SECONDS
    began = time.time()
    while time.monotonic() < deadline:
        if content := board.read():
            return content
        manifest = out / MANIFEST
        if manifest.exists() and manifest.stat().st_mtime > began:
            return None
        time.sleep(POLL_SECONDS)
    raise UserError("process 0 wrote no plan", key="out", value=out, remedy="See its log")
