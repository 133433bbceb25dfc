"""The store through which ranks exchange values: after a restart, and when it cannot be reached."""

import socket

import pytest

from fireflyds.distributed.launcher_env import RankInfo, free_port
from fireflyds.distributed.rendezvous import StoreChannel
from fireflyds.errors import UserError


def test_values_of_an_earlier_attempt_are_not_visible_after_a_restart(monkeypatch) -> None:
    rank_info = RankInfo(0, 0, 1, "127.0.0.1", free_port())
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    first_channel = StoreChannel(rank_info, 5)  # hosts the store, as the agent does
    first_channel.set("call/1", ["here", None])
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    second_channel = StoreChannel(rank_info, 5)
    assert first_channel.has("call/1")
    assert not second_channel.has("call/1")


def test_an_unreachable_rank_0_and_an_occupied_port_are_reported(monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    port = free_port()
    with pytest.raises(UserError, match=f"MASTER_ADDR:MASTER_PORT=127.0.0.1:{port}: rank 1 on .* did not reach rank 0"):
        StoreChannel(RankInfo(1, 1, 2, "127.0.0.1", port), 1)
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        occupied_port = listener.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{occupied_port}: the port is taken on rank 0's host"):
            StoreChannel(RankInfo(0, 0, 2, "127.0.0.1", occupied_port), 1)
