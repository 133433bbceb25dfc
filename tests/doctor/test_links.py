"""What is measured between ranks, and how it is judged."""

import pytest

from fireflyds.config import DoctorConfig
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.doctor import clocks, links
from fireflyds.doctor.check import Severity


def test_a_closed_port_is_named() -> None:
    with links.listening_socket("127.0.0.1") as door:
        port = door.getsockname()[1]
        assert links.connect_to([("north", "127.0.0.1", port)]) == []
    closed = links.connect_to([("north", "127.0.0.1", port)])
    assert len(closed) == 1
    assert f"north (127.0.0.1:{port})" in closed[0]
    check = links.check_ports({"south": closed, "north": []})
    assert check.severity is Severity.error
    assert check.message.startswith("south cannot reach north")


def test_rank_0_announces_the_address_that_all_came_by_and_the_others_their_own() -> None:
    with links.listening_socket("127.0.0.1") as store:
        port = store.getsockname()[1]
        # By the resolver of rank 0's own host the name may be 127.0.1.1.
        assert links.announced_address(RankInfo(0, 0, 2, "north.example", port), 2) == ("north.example", "")
        assert links.announced_address(RankInfo(1, 0, 2, "127.0.0.1", port), 2) == ("127.0.0.1", "127.0.0.1")
    with links.listening_socket("") as door:
        port = door.getsockname()[1]
        assert links.connect_to([("north", "127.0.0.1", port), ("north", "127.0.1.1", port)]) == []


def test_bus_bandwidth_is_that_of_a_ring() -> None:
    assert links.bus_bandwidth(1_000_000_000, 2, 1.0) == 1e9
    assert links.bus_bandwidth(1_000_000_000, 8, 0.5) == 3.5e9


@pytest.mark.parametrize(
    ("backend", "right", "severity"),
    [("nccl", True, Severity.warning), ("gloo", True, Severity.ok), ("nccl", False, Severity.error)],
)
def test_a_slow_all_reduce_is_yellow_and_a_wrong_sum_red(backend: str, right: bool, severity: Severity) -> None:
    answers = [
        {"seconds": [1.0], "right": True, "backend": backend},
        {"seconds": [9, 2, 1], "right": right, "backend": backend},
    ]
    check = links.check_all_reduce(answers, ["a", "b"], [True, True], DoctorConfig(all_reduce_mib=100))
    assert check.severity is severity
    assert right is False or check.value == pytest.approx(100 * 2**20 / 2 / 1e9)


@pytest.mark.parametrize(
    ("found", "severity", "words"),
    [
        ({1: (0.9, 0.01), 2: (-0.9, 0.01)}, Severity.warning, "b is 1.800 s ahead of c, ± 0.0200 s"),
        ({1: (0.9, 0.01), 2: (0.1, 0.01)}, Severity.ok, "0.9000 s apart at most"),
        ({1: (-200.0, 0.0), 2: (200.0, 0.0)}, Severity.error, "c is 400.000 s ahead of b"),
        ({1: (0.0, 0.0)}, Severity.error, "unknown: no answer from rank 2 on c"),
        ({}, Severity.error, "no answer from rank 1 on b, rank 2 on c"),
    ],
)
def test_clocks_are_compared_with_each_other_and_all_are_asked(found, severity: Severity, words: str) -> None:
    check = clocks.check_clocks(found, [0, 1, 2], ["a", "b", "c"], 1.0)
    assert check.severity is severity
    assert words in check.message
