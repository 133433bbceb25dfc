"""The store through which ranks talk, also after a restart, and where there is none."""

import socket

import pytest

from fireflyds.distributed.launcher_env import RankInfo, free_port
from fireflyds.distributed.rendezvous import StoreChannel
from fireflyds.errors import UserError


def test_what_an_earlier_attempt_said_is_not_heard_again(monkeypatch) -> None:
    me = RankInfo(0, 0, 1, "127.0.0.1", free_port())
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    first = StoreChannel(me, 5)  # keeps the store, as the agent does
    first.set("call/1", ["here", None])
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    second = StoreChannel(me, 5)
    assert first.has("call/1")
    assert not second.has("call/1")


def test_rank_0_that_is_not_there_or_a_port_that_is_taken_is_said(monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    port = free_port()
    with pytest.raises(UserError, match=f"MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}: rank 1 on .* did not reach rank 0"):
        StoreChannel(RankInfo(1, 1, 2, "127.0.0.1", port), 1)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        taken = other.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{taken}: the port is taken on rank 0's host"):
            StoreChannel(RankInfo(0, 0, 2, "127.0.0.1", taken), 1)
