"""Ranks on several hosts, each a thread here: their links are tested, and unresponsive ranks are named."""

import json
import socket
import threading
import time
from types import SimpleNamespace

import pytest
from threads import each_in_its_thread

from fireflyds.config import DoctorConfig
from fireflyds.distributed import clock_offset, rendezvous, shared_folder
from fireflyds.distributed.launcher_env import RankInfo, free_port
from fireflyds.distributed.rendezvous import StoreChannel
from fireflyds.doctor import links, session, signal_guards
from fireflyds.doctor.check import Severity, passed
from fireflyds.errors import UserError

HOSTS = ["north", "north", "south"]


def _rank() -> int:
    name = threading.current_thread().name
    return int(name) if name.isdigit() else 0


@pytest.fixture
def examine_ranks(tmp_path, monkeypatch):
    """Runs `examine` on three ranks of two hosts; returns rank 0's findings by name, and the hosts."""
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(session.socket, "gethostname", lambda: HOSTS[_rank()])
    monkeypatch.setattr(session.socket, "gethostbyname", lambda name: "10.0.0.1")
    monkeypatch.setattr(session, "inspect_host", _inspect_host)
    monkeypatch.setattr(links, "all_reduce", _all_reduce)
    monkeypatch.setattr(rendezvous, "_GRACE", 0.2)

    def run(*present_ranks: int, **config_by_rank):
        port, results, errors = free_port(), {}, {}

        def examine_rank(rank: int) -> None:
            config = config_by_rank.get(f"rank{rank}", DoctorConfig(runs=str(tmp_path), timeout=2, shared_timeout=0.3))
            try:
                results[rank] = session.examine(
                    RankInfo(rank, HOSTS[:rank].count(HOSTS[rank]), 3, "127.0.0.1", port), config
                )
            except UserError as error:
                errors[rank] = str(error)

        each_in_its_thread(present_ranks, examine_rank)
        assert results.keys() | errors.keys() == set(present_ranks)
        assert all("rank 0 has left" in error for error in errors.values()), errors
        assert [results[rank] for rank in results if rank] == [None] * (len(results) - 1)
        checks, hosts = results[0]
        return checks, hosts

    return run


def _all_reduce(channel: StoreChannel, config: DoctorConfig):
    channel.set(f"joined/{channel.me.rank}", True)
    return {"seconds": [0.5, 0.1, 0.3], "right": True, "backend": "gloo"}


def _inspect_host(config: DoctorConfig, num_ranks: int, hosts: int, cores: int | None):
    return [passed("gpus", f"{num_ranks} ranks, {hosts} hosts"), passed("cores", f"{cores}")]


def _by_name(checks):
    return {check.name: check for check in checks}


def test_every_check_of_a_healthy_cluster_is_ok(examine_ranks, tmp_path) -> None:
    checks, hosts = examine_ranks(0, 1, 2)
    assert hosts == ["north", "south"]
    assert [(check.name, check.host) for check in checks] == [
        ("gpus", "north"), ("cores", "north"), ("gpus", "south"), ("cores", "south"), ("hosts", ""),
        ("same versions", ""), ("same gpus", ""), ("ports", ""), ("clock skew", ""), ("shared folder", ""),
        ("all-reduce", ""),
    ]  # fmt: skip
    assert {check.severity for check in checks if check.name != "hosts"} == {Severity.ok}, checks
    assert [check.message for check in checks[:4:2]] == ["2 ranks, 2 hosts", "1 ranks, 2 hosts"]
    check_by_name = _by_name(checks)
    assert check_by_name["hosts"].message == "3 ranks on 2 hosts: north (2), south (1)"
    assert 0 <= check_by_name["clock skew"].value < 0.5
    assert check_by_name["all-reduce"].value == pytest.approx(2 * 2 / 3 * 64 * 2**20 / 0.3 / 1e9)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_rank_is_named_within_the_timeout(examine_ranks) -> None:
    started = time.monotonic()
    checks, hosts = examine_ranks(0, 1)
    assert time.monotonic() - started < 20
    check_by_name = _by_name(checks)
    assert check_by_name["gpus"].severity is Severity.ok  # completed checks are reported
    assert check_by_name["ranks"].severity is Severity.error
    assert check_by_name["ranks"].message == "rank 2 of 3: did not connect within 2 s; later checks skipped"
    assert hosts == ["north"]


def test_a_rank_that_hangs_in_the_all_reduce_is_named(examine_ranks, monkeypatch) -> None:
    release = threading.Event()

    def delayed_all_reduce(channel: StoreChannel, config: DoctorConfig):
        if channel.me.rank == 2:
            release.wait(4)
        return _all_reduce(channel, config)

    monkeypatch.setattr(links, "all_reduce", delayed_all_reduce)
    checks, _ = examine_ranks(0, 1, 2)
    check = _by_name(checks)["all-reduce"]
    assert check.severity is Severity.error
    assert check.message == "rank 2 on south: no answer; rank 2 did not join the group"


def test_a_rank_whose_all_reduce_fails_is_named_with_its_error(examine_ranks, monkeypatch) -> None:
    def failing_all_reduce(channel: StoreChannel, config: DoctorConfig):
        result = _all_reduce(channel, config)
        if channel.me.rank == 1:
            raise RuntimeError("NCCL error: unhandled system error\nmore")
        return result

    monkeypatch.setattr(links, "all_reduce", failing_all_reduce)
    check = _by_name(examine_ranks(0, 1, 2)[0])["all-reduce"]
    assert check.message == "rank 1 on north: NCCL error: unhandled system error; all ranks had joined the group"
    assert "NCCL_DEBUG=INFO" in check.remedy


def test_a_different_runs_folder_on_one_host_is_an_error(examine_ranks, tmp_path) -> None:
    (tmp_path / "local").mkdir()
    local_config = DoctorConfig(runs=str(tmp_path / "local"), timeout=2, shared_timeout=0.3)
    check = _by_name(examine_ranks(0, 1, 2, rank2=local_config)[0])["shared folder"]
    assert check.severity is Severity.error
    assert "not seen by rank 2 (on south)" in check.message
    assert str(tmp_path / "local") in check.message
    assert list(tmp_path.iterdir()) == [tmp_path / "local"]


def test_a_wrong_clock_is_reported_with_its_host(examine_ranks, monkeypatch) -> None:
    offset_by_rank = {2: 7.5}
    clock = SimpleNamespace(
        time=lambda: time.time() + offset_by_rank.get(_rank(), 0.0), perf_counter=time.perf_counter, sleep=time.sleep
    )
    monkeypatch.setattr(clock_offset, "time", clock)
    check = _by_name(examine_ranks(0, 1, 2)[0])["clock skew"]
    assert check.severity is Severity.warning
    assert check.value == pytest.approx(7.5, abs=0.2)
    assert "south is 7.5" in check.message
    assert "ahead of north" in check.message
    offset_by_rank[2] = -400.0
    check = _by_name(examine_ranks(0, 1, 2)[0])["clock skew"]
    assert check.severity is Severity.error
    assert "north is 400.000 s ahead of south" in check.message


def test_an_unknown_clock_is_an_error(examine_ranks, tmp_path, monkeypatch) -> None:
    def failing_answer_pings(channel: StoreChannel, payload) -> None:
        if channel.me.rank == 2:
            raise RuntimeError("no clock")

    monkeypatch.setattr(clock_offset, "answer_pings", failing_answer_pings)
    short_timeout = DoctorConfig(runs=str(tmp_path), timeout=1, shared_timeout=0.3)
    check = _by_name(examine_ranks(0, 1, 2, rank0=short_timeout)[0])["clock skew"]
    assert check.severity is Severity.error
    assert check.message == "unknown: no answer from rank 2 on south"


def test_different_versions_on_a_host_are_an_error(examine_ranks, monkeypatch) -> None:
    monkeypatch.setattr(session.versions, "installed", lambda required: {"torch": "2.14" if _rank() == 2 else "2.13"})
    check = _by_name(examine_ranks(0, 1, 2)[0])["same versions"]
    assert check.severity is Severity.error
    assert check.message == "torch 2.13 on north, 2.14 on south"


def test_an_occupied_port_of_the_launcher_is_a_warning() -> None:
    with socket.socket() as listener:
        listener.bind(("", 0))
        listener.listen()
        assert session.check_port(listener.getsockname()[1]).severity is Severity.warning
    assert session.check_port(free_port()).severity is Severity.ok


def test_a_host_without_its_gpus_is_an_error(examine_ranks, monkeypatch) -> None:
    monkeypatch.setattr(session.gpus, "names", lambda: [] if _rank() == 2 else ["H200"] * 8)
    check = _by_name(examine_ranks(0, 1, 2)[0])["same gpus"]
    assert check.severity is Severity.error
    assert check.message == "none for rank 2 on south, but other ranks have GPUs"


def test_hosts_of_one_name_get_a_number_and_are_an_error(examine_ranks, monkeypatch) -> None:
    monkeypatch.setattr(session.socket, "gethostname", lambda: "north")
    monkeypatch.setattr(session, "boot_id", lambda: f"boot of {HOSTS[_rank()]}")
    checks, hosts = examine_ranks(0, 1, 2)
    assert hosts == ["north", "north#2"]
    assert [check.host for check in checks if check.name == "gpus"] == ["north", "north#2"]
    check = _by_name(checks)["hosts"]
    assert check.severity is Severity.error
    assert check.message == "3 ranks on 2 hosts: north (2), north#2 (1); several machines are called north"
    assert check.remedy.startswith("give every node its own name: hostnamectl set-hostname")


def test_cores_of_bound_ranks_are_added_up(examine_ranks, monkeypatch) -> None:
    cores_by_rank = {0: {0, 1}, 1: {2, 3, 4}, 2: {0, 1}}
    monkeypatch.setattr(session.os, "sched_getaffinity", lambda process: cores_by_rank[_rank()])
    checks, _ = examine_ranks(0, 1, 2)
    assert [check.message for check in checks if check.name == "cores"] == ["5", "2"]


def test_a_report_that_the_launcher_terminates_holds_the_completed_checks(examine_ranks, monkeypatch) -> None:
    def raise_terminated(channel: StoreChannel, config: DoctorConfig):
        if channel.me.rank == 0:
            raise signal_guards.TerminatedError
        return _all_reduce(channel, config)

    monkeypatch.setattr(links, "all_reduce", raise_terminated)
    checks, _ = examine_ranks(0, 1, 2)
    check_by_name = _by_name(checks)
    assert check_by_name["shared folder"].severity is Severity.ok
    assert "all-reduce" not in check_by_name
    assert check_by_name["ranks"].severity is Severity.error
    assert "the launcher terminated this rank (SIGTERM) during the checks: another rank has failed" in (
        check_by_name["ranks"].message
    )
    assert "/dev/shm" in check_by_name["ranks"].remedy


def test_an_unresponsive_runs_folder_is_an_error_within_the_timeout(examine_ranks, monkeypatch) -> None:
    release = threading.Event()

    def hanging_existing_part(runs: str):
        if _rank() == 0 and not release.wait(8):
            return runs
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(shared_folder, "existing_part", hanging_existing_part)
    config = DoctorConfig(runs="gone", timeout=1, shared_timeout=0.1)
    check = _by_name(examine_ranks(0, 1, 2, rank0=config)[0])["shared folder"]
    assert check.severity is Severity.error
    assert check.message == "runs=gone: rank 0 cannot write there (no answer within 1 s), so the others were skipped"
    release.set()
    check = _by_name(examine_ranks(0, 1, 2, rank0=config)[0])["shared folder"]
    assert "Stale file handle" in check.message


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [("torchrun", "--standalone", "--nproc_per_node", "2"), ("deepspeed", "--num_gpus", "2")]
)
def test_two_ranks_of_this_machine_report_once_in_json(verb, tmp_path, launcher) -> None:
    completed = verb("doctor", "format=json", "disk_mib=8", "all_reduce_mib=8", start=launcher)
    lines = [line for line in completed.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    report = json.loads(lines[0])
    assert report["ranks"] == 2
    assert len(report["hosts"]) == 1
    check_by_name = {check["name"]: check for check in report["checks"]}
    assert len(check_by_name) == len(report["checks"])
    assert check_by_name["all-reduce"]["value"] > 0
    assert check_by_name["all-reduce"]["unit"] == "GB/s"
    assert 0 <= check_by_name["clock skew"]["value"] < 1
    assert check_by_name["shared folder"]["severity"] == "ok"
    assert "all 2 ranks see" in check_by_name["shared folder"]["message"]
    assert list(tmp_path.iterdir()) == []
