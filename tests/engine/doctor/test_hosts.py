"""Hosts and their names, and the ranks that do not come to them."""

from fireflyds.engine.doctor import hosts
from fireflyds.engine.doctor.check import Verdict
from fireflyds.engine.meeting import SilentError
from fireflyds.engine.ranks import Ranks


def test_hosts_with_unequal_ranks_or_without_an_address_are_yellow(monkeypatch) -> None:
    monkeypatch.setattr(hosts.socket, "gethostbyname", lambda name: "10.0.0.1")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)
    assert hosts.check_hosts(["a", "a", "b", "b"], "a").verdict is Verdict.green
    assert hosts.check_hosts(["a", "a", "b"], "a").verdict is Verdict.yellow
    monkeypatch.setattr(hosts.socket, "gethostbyname", lambda name: "127.0.1.1")
    loop = hosts.check_hosts(["a", "b"], "a")
    assert loop.verdict is Verdict.yellow
    assert "a is 127.0.1.1 to itself" in loop.found
    assert hosts.check_hosts(["a", "a"], "a").verdict is Verdict.green  # one host needs none


def test_silent_ranks_are_named_by_their_node_where_they_have_not_said_their_host(monkeypatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    me = Ranks(0, 0, 32, "north", 29500)
    check = hosts.check_silent(SilentError("here", [15, 16], {}), me, [], 60)
    assert check.found.startswith("rank 15 (node 1), rank 16 (node 2) of 32: not come within 60 s")


def test_machines_of_one_name_get_a_number() -> None:
    assert hosts.tell_apart(["a", "b", "a", "a", "b"], ["1", "2", "1", "3", "2"]) == ["a", "b", "a", "a#2", "b"]
    assert hosts.tell_apart(["a", "b"], ["", ""]) == ["a", "b"]
