"""Measurements between ranks and their severity."""

from types import SimpleNamespace

import pytest
import torch

from fireflyds.config import DoctorConfig
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.doctor import clocks, links
from fireflyds.doctor.check import Severity


def test_a_closed_port_is_named() -> None:
    with links.listening_socket("127.0.0.1") as listener:
        port = listener.getsockname()[1]
        assert links.connect_to([("north", "127.0.0.1", port)]) == []
    unreachable = links.connect_to([("north", "127.0.0.1", port)])
    assert len(unreachable) == 1
    assert f"north (127.0.0.1:{port})" in unreachable[0]
    check = links.check_ports({"south": unreachable, "north": []})
    assert check.severity is Severity.error
    assert check.message.startswith("south cannot reach north")


def test_rank_0_announces_the_master_address_and_the_others_their_own() -> None:
    with links.listening_socket("127.0.0.1") as store_listener:
        port = store_listener.getsockname()[1]
        # Rank 0's own host may resolve the name to 127.0.1.1.
        assert links.announced_address(RankInfo(0, 0, 2, "north.example", port), 2) == ("north.example", "")
        assert links.announced_address(RankInfo(1, 0, 2, "127.0.0.1", port), 2) == ("127.0.0.1", "127.0.0.1")
    with links.listening_socket("") as listener:
        port = listener.getsockname()[1]
        assert links.connect_to([("north", "127.0.0.1", port), ("north", "127.0.1.1", port)]) == []


def test_bus_bandwidth_is_that_of_a_ring() -> None:
    assert links.bus_bandwidth(1_000_000_000, 2, 1.0) == 1e9
    assert links.bus_bandwidth(1_000_000_000, 8, 0.5) == 3.5e9


@pytest.mark.parametrize(
    ("backend", "is_correct", "severity"),
    [("nccl", True, Severity.warning), ("gloo", True, Severity.ok), ("nccl", False, Severity.error)],
)
def test_a_slow_all_reduce_is_a_warning_and_a_wrong_sum_an_error(
    backend: str, is_correct: bool, severity: Severity
) -> None:
    answers = [
        {"seconds": [1.0], "right": True, "backend": backend},
        {"seconds": [9, 2, 1], "right": is_correct, "backend": backend},
    ]
    check = links.check_all_reduce(answers, ["a", "b"], [True, True], DoctorConfig(all_reduce_mib=100))
    assert check.severity is severity
    assert is_correct is False or check.value == pytest.approx(100 * 2**20 / 2 / 1e9)


@pytest.mark.parametrize(
    ("offsets", "severity", "message"),
    [
        ({1: (0.9, 0.01), 2: (-0.9, 0.01)}, Severity.warning, "b is 1.800 s ahead of c, ± 0.0200 s"),
        ({1: (0.9, 0.01), 2: (0.1, 0.01)}, Severity.ok, "0.9000 s apart at most"),
        ({1: (-200.0, 0.0), 2: (200.0, 0.0)}, Severity.error, "c is 400.000 s ahead of b"),
        ({1: (0.0, 0.0)}, Severity.error, "unknown: no answer from rank 2 on c"),
        ({}, Severity.error, "no answer from rank 1 on b, rank 2 on c"),
    ],
)
def test_clocks_are_compared_with_each_other_and_a_missing_one_is_an_error(
    offsets, severity: Severity, message: str
) -> None:
    check = clocks.check_clocks(offsets, [0, 1, 2], ["a", "b", "c"], 1.0)
    assert check.severity is severity
    assert message in check.message


class _DeviceTakenError(Exception):
    pass


def test_the_all_reduce_runs_on_the_gpu_that_training_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    # Slurm shows each task one GPU, number 0, also to local rank 1.
    def take(*sizes: int, device: torch.device) -> None:
        raise _DeviceTakenError(device)

    channel = SimpleNamespace(me=RankInfo(1, 1, 2, "127.0.0.1", 1), set=lambda key, value: None)
    monkeypatch.setattr(links.engine, "init_distributed", lambda me, minutes: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "empty", take)
    with pytest.raises(_DeviceTakenError) as taken:
        links.all_reduce(channel, DoctorConfig(timeout=5))
    assert taken.value.args == (torch.device("cuda", 0),)
