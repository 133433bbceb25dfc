"""Checks of hosts and their names, and of ranks that do not connect."""

from fireflyds.distributed.host_identity import distinct_host_names
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.distributed.rendezvous import UnresponsiveRanksError
from fireflyds.doctor import hosts
from fireflyds.doctor.check import Severity


def test_hosts_with_unequal_ranks_or_without_an_address_are_a_warning(monkeypatch) -> None:
    monkeypatch.setattr(hosts.socket, "gethostbyname", lambda name: "10.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert hosts.check_hosts(["a", "a", "b", "b"], "a").severity is Severity.ok
    assert hosts.check_hosts(["a", "a", "b"], "a").severity is Severity.warning
    monkeypatch.setattr(hosts.socket, "gethostbyname", lambda name: "127.0.1.1")
    loopback_check = hosts.check_hosts(["a", "b"], "a")
    assert loopback_check.severity is Severity.warning
    assert "a resolves its own name to 127.0.1.1" in loopback_check.message
    assert hosts.check_hosts(["a", "a"], "a").severity is Severity.ok  # a single host needs no address


def test_unresponsive_ranks_without_a_host_name_are_named_by_their_node(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    rank_info = RankInfo(0, 0, 32, "north", 29500)
    check = hosts.check_unresponsive(UnresponsiveRanksError("identify", [15, 16], {}), rank_info, [], 60)
    assert check.message.startswith("rank 15 (node 1), rank 16 (node 2) of 32: did not connect within 60 s")


def test_equal_host_names_get_a_number() -> None:
    assert distinct_host_names(["a", "b", "a", "a", "b"], ["1", "2", "1", "3", "2"]) == ["a", "b", "a", "a#2", "b"]
    assert distinct_host_names(["a", "b"], ["", ""]) == ["a", "b"]
