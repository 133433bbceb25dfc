"""Hosts and their names, and the ranks that do not come to them."""

from fireflyds.distributed.host_identity import distinct_host_names
from fireflyds.distributed.launcher_env import RankInfo
from fireflyds.distributed.rendezvous import UnresponsiveRanksError
from fireflyds.doctor import hosts
from fireflyds.doctor.check import Severity


def test_hosts_with_unequal_ranks_or_without_an_address_are_yellow(monkeypatch) -> None:
    monkeypatch.setattr(hosts.socket, "gethostbyname", lambda name: "10.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert hosts.check_hosts(["a", "a", "b", "b"], "a").severity is Severity.ok
    assert hosts.check_hosts(["a", "a", "b"], "a").severity is Severity.warning
    monkeypatch.setattr(hosts.socket, "gethostbyname", lambda name: "127.0.1.1")
    loop = hosts.check_hosts(["a", "b"], "a")
    assert loop.severity is Severity.warning
    assert "a resolves its own name to 127.0.1.1" in loop.message
    assert hosts.check_hosts(["a", "a"], "a").severity is Severity.ok  # one host needs none


def test_silent_ranks_are_named_by_their_node_where_they_have_not_said_their_host(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    me = RankInfo(0, 0, 32, "north", 29500)
    check = hosts.check_unresponsive(UnresponsiveRanksError("identify", [15, 16], {}), me, [], 60)
    assert check.message.startswith("rank 15 (node 1), rank 16 (node 2) of 32: did not connect within 60 s")


def test_machines_of_one_name_get_a_number() -> None:
    assert distinct_host_names(["a", "b", "a", "a", "b"], ["1", "2", "1", "3", "2"]) == ["a", "b", "a", "a#2", "b"]
    assert distinct_host_names(["a", "b"], ["", ""]) == ["a", "b"]
