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
from fireflyds.errors import UserError
from fireflyds.types import Encoder

# Processes of one start begin within this time.
_START_SECONDS = 1800.0
# The claim that process 0 holds until the store is written.
_LEADER = "leader"


def _claims_folder(out: Path) -> Path:
    out = out.resolve()
    return out.with_name(f".{out.name}.claims")


class Leader:
    """Process 0, alone or with others: says that it lives, what is to be made, and how it ended."""

    def __init__(self, config: PrepareConfig, out: Path, size: int) -> None:
        self._config, self._size = config, size
        self._board = Board(out, job_of(os.environ))
        self._folder = _claims_folder(out)
        self._claims = Claims(self._folder, config.lost_after_seconds)

    def __enter__(self) -> "Leader":
        self._board.clear()
        shutil.rmtree(self._folder, ignore_errors=True)
        if self._size > 1:
            self._folder.parent.mkdir(parents=True, exist_ok=True)
            self._claims.__enter__()
            self._claims.take(_LEADER)
            self._board.write(self._size, "planning")
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        if self._size > 1:
            self._board.write(self._size, "done" if kind is None else "failed")
            self._claims.__exit__()
            shutil.rmtree(self._folder, ignore_errors=True)

    @property
    def is_alone(self) -> bool:
        """True where there is no other process."""
        return self._size == 1

    def make_parts(
        self,
        tasks: list[EncodeTask],
        load_encoder: Callable[[], Encoder],
        folder: Path,
        earlier: Path,
        made_from: dict[str, Any],
    ) -> list[dict[str, Any]]:
        """As `build.make_parts`, together with the other processes.

        Raises:
            UserError: a part was damaged while it was written.
        """
        _, missing = reuse_parts(tasks, folder, earlier, made_from)
        plan = {"folder": str(folder), "template": self._config.template, "made_from": made_from}
        self._board.write(self._size, "work", **plan, tasks=[asdict(task) for task in missing])
        place = SharedPlace(0, self._size, self._claims)
        make_shared_parts(self._config, missing, load_encoder, folder, made_from, place)
        finished, damaged = reuse_parts(tasks, folder, earlier, made_from)
        if damaged:
            raise UserError(
                f"{len(damaged):,} parts were damaged while they were written",
                key="out",
                value=folder,
                remedy="Give the command again",
            )
        return [finished[task.key] for task in tasks]


def follow(config: PrepareConfig, out: Path, load_encoder: Callable[[], Encoder], rank: int, size: int) -> None:
    """Another process: waits for the plan, makes its share, and waits for the end.

    Raises:
        UserError: process 0 failed or was lost, or did not start.
    """
    board = Board(out, job_of(os.environ))
    content = _wait(board, rank, lambda content: True, lambda: False, _START_SECONDS, out)
    if content["state"] in ("planning", "work"):
        with Claims(_claims_folder(out), config.lost_after_seconds) as claims:
            content = _share(config, out, load_encoder, board, SharedPlace(rank, size, claims))
    board.seen(rank)
    if content["state"] == "failed":
        raise UserError("process 0 failed; its message says why", key="out", value=out, remedy="See its log")


def _share(
    config: PrepareConfig, out: Path, load_encoder: Callable[[], Encoder], board: Board, place: SharedPlace
) -> dict[str, Any]:
    """Makes the share of this process. Returns what process 0 wrote at the end."""

    def is_lost() -> bool:
        return place.claims.is_lost(_LEADER)

    content = _wait(board, place.rank, lambda content: content["state"] != "planning", is_lost, None, out)
    if content["state"] != "work":
        return content
    tasks = [EncodeTask(**{**task, "part": _part(task["part"])}) for task in content["tasks"]]
    config = replace(config, template=content["template"])
    # Process 0 may end between two looks at the parts, and moves their folder then.
    with contextlib.suppress(FileNotFoundError):
        make_shared_parts(config, tasks, load_encoder, Path(content["folder"]), content["made_from"], place)
    return _wait(board, place.rank, lambda content: content["state"] != "work", is_lost, None, out)


def _wait(
    board: Board,
    rank: int,
    is_enough: Callable[[Any], bool],
    is_lost: Callable[[], bool],
    seconds: float | None,
    out: Path,
) -> dict[str, Any]:
    """What process 0 wrote, as soon as it is enough."""
    deadline = None if seconds is None else time.monotonic() + seconds
    while True:
        content = board.read(rank)
        if content is not None and is_enough(content):
            return content
        if is_lost() or (deadline is not None and time.monotonic() > deadline):
            raise UserError(
                "process 0 was lost before it wrote the index; the parts that are finished are kept"
                if deadline is None
                else f"process 0 did not start within {seconds:,.0f} s",
                key="out",
                value=out,
                remedy="Give the command again; all processes must see this folder",
            )
        time.sleep(POLL_SECONDS)


def _part(fields: dict[str, Any]) -> FilePart:
    shard = fields["shard"] and tuple(fields["shard"])
    return FilePart(**{**fields, "shard": shard})
