"""Work on rank 0: the other ranks end with the same error, or with one that names it."""

import errno
import os
import pickle
from collections.abc import Callable

import pytest
import torch.distributed as dist

from fireflyds.distributed.collectives import run_on_rank_zero
from fireflyds.errors import LostRankError, UserError


def outcome_by_rank(work: Callable[[], str], monkeypatch: pytest.MonkeyPatch) -> list[str | Exception | None]:
    """What ranks 0 and 1 return or raise, run after each other with a broadcast of their own."""
    messages: list[bytes] = []

    def broadcast(values: list[object]) -> None:
        if dist.get_rank() == 0:
            messages.append(pickle.dumps(values))
        else:
            values[:] = pickle.loads(messages[-1])

    monkeypatch.setattr(dist, "broadcast_object_list", broadcast)
    outcomes: list[str | Exception | None] = []
    for rank in (0, 1):
        monkeypatch.setattr(dist, "get_rank", lambda rank=rank: rank)
        try:
            outcomes.append(run_on_rank_zero(work))
        except Exception as error:
            outcomes.append(error)
    return outcomes


def raising(error: Exception) -> Callable[[], str]:
    def work() -> str:
        raise error

    return work


def test_only_rank_zero_has_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    assert outcome_by_rank(lambda: "lock", monkeypatch) == ["lock", None]


def test_a_user_error_keeps_its_class_and_fields_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    error = LostRankError("no answer", key="run", value="a", rank=3, remedy="Start again").within("step 1")
    for outcome in outcome_by_rank(raising(error), monkeypatch):
        assert type(outcome) is LostRankError
        assert vars(outcome) == vars(error)


def test_an_os_error_on_rank_zero_is_a_user_error_on_every_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "runs/a/x")
    for outcome in outcome_by_rank(raising(error), monkeypatch):
        assert isinstance(outcome, UserError)
        assert outcome.rule == "[Errno 28] No space left on device: 'runs/a/x'"
        assert outcome.remedy == "Free disk space or correct permissions, and run the command again"


def test_any_other_error_is_raised_unchanged_on_rank_zero_and_named_on_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    error = KeyError("step")
    first, second = outcome_by_rank(raising(error), monkeypatch)
    assert first is error
    assert isinstance(second, UserError)
    assert str(second) == "rank 0 failed (KeyError: 'step'). See the log of rank 0"
