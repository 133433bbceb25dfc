"""Ranks on several hosts, each a thread here: what lies between them is tried, and who is silent is named."""

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
def cluster(tmp_path, monkeypatch):
    """Runs `examine` on three ranks of two hosts; returns rank 0's findings by name, and the hosts."""
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(session.socket, "gethostname", lambda: HOSTS[_rank()])
    monkeypatch.setattr(session.socket, "gethostbyname", lambda name: "10.0.0.1")
    monkeypatch.setattr(session, "inspect_host", _looked)
    monkeypatch.setattr(links, "all_reduce", _reduced)
    monkeypatch.setattr(rendezvous, "_GRACE", 0.2)

    def run(*present: int, **of_rank):
        port, found, errors = free_port(), {}, {}

        def one(rank: int) -> None:
            config = of_rank.get(f"rank{rank}", DoctorConfig(runs=str(tmp_path), timeout=2, shared_timeout=0.3))
            try:
                found[rank] = session.examine(
                    RankInfo(rank, HOSTS[:rank].count(HOSTS[rank]), 3, "127.0.0.1", port), config
                )
            except UserError as error:
                errors[rank] = str(error)

        each_in_its_thread(present, one)
        assert found.keys() | errors.keys() == set(present)
        assert all("rank 0 has left" in error for error in errors.values()), errors
        assert [found[rank] for rank in found if rank] == [None] * (len(found) - 1)
        checks, hosts = found[0]
        return checks, hosts

    return run


def _reduced(at: StoreChannel, config: DoctorConfig):
    at.set(f"joined/{at.me.rank}", True)
    return {"seconds": [0.5, 0.1, 0.3], "right": True, "backend": "gloo"}


def _looked(config: DoctorConfig, here: int, hosts: int, cores: int | None):
    return [passed("gpus", f"{here} ranks, {hosts} hosts"), passed("cores", f"{cores}")]


def _by_name(checks):
    return {check.name: check for check in checks}


def test_a_sound_cluster_is_green_throughout(cluster, tmp_path) -> None:
    checks, hosts = cluster(0, 1, 2)
    assert hosts == ["north", "south"]
    assert [(check.name, check.host) for check in checks] == [
        ("gpus", "north"), ("cores", "north"), ("gpus", "south"), ("cores", "south"), ("hosts", ""),
        ("same versions", ""), ("same gpus", ""), ("ports", ""), ("clock skew", ""), ("shared folder", ""),
        ("all-reduce", ""),
    ]  # fmt: skip
    assert {check.severity for check in checks if check.name != "hosts"} == {Severity.ok}, checks
    assert [check.message for check in checks[:4:2]] == ["2 ranks, 2 hosts", "1 ranks, 2 hosts"]
    found = _by_name(checks)
    assert found["hosts"].message == "3 ranks on 2 hosts: north (2), south (1)"
    assert 0 <= found["clock skew"].value < 0.5
    assert found["all-reduce"].value == pytest.approx(2 * 2 / 3 * 64 * 2**20 / 0.3 / 1e9)
    assert list(tmp_path.iterdir()) == []


def test_a_rank_that_never_comes_is_named_in_time(cluster) -> None:
    started = time.monotonic()
    checks, hosts = cluster(0, 1)
    assert time.monotonic() - started < 20
    found = _by_name(checks)
    assert found["gpus"].severity is Severity.ok  # what is known is told
    assert found["ranks"].severity is Severity.error
    assert found["ranks"].message == "rank 2 of 3: did not connect within 2 s; later checks skipped"
    assert hosts == ["north"]


def test_a_rank_that_falls_silent_in_the_all_reduce_is_named(cluster, monkeypatch) -> None:
    late = threading.Event()

    def hangs(at: StoreChannel, config: DoctorConfig):
        if at.me.rank == 2:
            late.wait(4)
        return _reduced(at, config)

    monkeypatch.setattr(links, "all_reduce", hangs)
    checks, _ = cluster(0, 1, 2)
    check = _by_name(checks)["all-reduce"]
    assert check.severity is Severity.error
    assert check.message == "rank 2 on south: no answer; rank 2 did not join the group"


def test_a_rank_whose_part_fails_is_named_with_its_reason(cluster, monkeypatch) -> None:
    def fails(at: StoreChannel, config: DoctorConfig):
        done = _reduced(at, config)
        if at.me.rank == 1:
            raise RuntimeError("NCCL error: unhandled system error\nmore")
        return done

    monkeypatch.setattr(links, "all_reduce", fails)
    check = _by_name(cluster(0, 1, 2)[0])["all-reduce"]
    assert check.message == "rank 1 on north: NCCL error: unhandled system error; all ranks had joined the group"
    assert "NCCL_DEBUG=INFO" in check.remedy


def test_a_folder_that_is_another_on_one_host_is_red(cluster, tmp_path) -> None:
    (tmp_path / "local").mkdir()
    elsewhere = DoctorConfig(runs=str(tmp_path / "local"), timeout=2, shared_timeout=0.3)
    check = _by_name(cluster(0, 1, 2, rank2=elsewhere)[0])["shared folder"]
    assert check.severity is Severity.error
    assert "not seen by rank 2 (on south)" in check.message
    assert str(tmp_path / "local") in check.message
    assert list(tmp_path.iterdir()) == [tmp_path / "local"]


def test_a_clock_that_is_wrong_is_found_with_its_host(cluster, monkeypatch) -> None:
    ahead = {2: 7.5}
    clock = SimpleNamespace(
        time=lambda: time.time() + ahead.get(_rank(), 0.0), perf_counter=time.perf_counter, sleep=time.sleep
    )
    monkeypatch.setattr(clock_offset, "time", clock)
    check = _by_name(cluster(0, 1, 2)[0])["clock skew"]
    assert check.severity is Severity.warning
    assert check.value == pytest.approx(7.5, abs=0.2)
    assert "south is 7.5" in check.message
    assert "ahead of north" in check.message
    ahead[2] = -400.0
    check = _by_name(cluster(0, 1, 2)[0])["clock skew"]
    assert check.severity is Severity.error
    assert "north is 400.000 s ahead of south" in check.message


def test_a_host_whose_clock_is_not_known_is_red(cluster, tmp_path, monkeypatch) -> None:
    def fails(at: StoreChannel, payload) -> None:
        if at.me.rank == 2:
            raise RuntimeError("no clock")

    monkeypatch.setattr(clock_offset, "answer_pings", fails)
    hasty = DoctorConfig(runs=str(tmp_path), timeout=1, shared_timeout=0.3)
    check = _by_name(cluster(0, 1, 2, rank0=hasty)[0])["clock skew"]
    assert check.severity is Severity.error
    assert check.message == "unknown: no answer from rank 2 on south"


def test_other_versions_on_a_host_are_found(cluster, monkeypatch) -> None:
    monkeypatch.setattr(session.versions, "installed", lambda required: {"torch": "2.14" if _rank() == 2 else "2.13"})
    check = _by_name(cluster(0, 1, 2)[0])["same versions"]
    assert check.severity is Severity.error
    assert check.message == "torch 2.13 on north, 2.14 on south"


def test_launchers_port_taken_by_another_is_yellow() -> None:
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        assert session.check_port(other.getsockname()[1]).severity is Severity.warning
    assert session.check_port(free_port()).severity is Severity.ok


def test_a_host_whose_gpus_are_gone_is_red(cluster, monkeypatch) -> None:
    monkeypatch.setattr(session.gpus, "names", lambda: [] if _rank() == 2 else ["H200"] * 8)
    check = _by_name(cluster(0, 1, 2)[0])["same gpus"]
    assert check.severity is Severity.error
    assert check.message == "none for rank 2 on south, but other ranks have GPUs"


def test_machines_of_one_name_are_told_apart_and_red(cluster, monkeypatch) -> None:
    monkeypatch.setattr(session.socket, "gethostname", lambda: "north")
    monkeypatch.setattr(session, "boot_id", lambda: f"boot of {HOSTS[_rank()]}")
    checks, found = cluster(0, 1, 2)
    assert found == ["north", "north#2"]
    assert [check.host for check in checks if check.name == "gpus"] == ["north", "north#2"]
    check = _by_name(checks)["hosts"]
    assert check.severity is Severity.error
    assert check.message == "3 ranks on 2 hosts: north (2), north#2 (1); several machines are called north"
    assert check.remedy.startswith("give every node its own name: hostnamectl set-hostname")


def test_cores_that_ranks_are_bound_to_are_added_up(cluster, monkeypatch) -> None:
    bound = {0: {0, 1}, 1: {2, 3, 4}, 2: {0, 1}}
    monkeypatch.setattr(session.os, "sched_getaffinity", lambda process: bound[_rank()])
    checks, _ = cluster(0, 1, 2)
    assert [check.message for check in checks if check.name == "cores"] == ["5", "2"]


def test_a_report_that_the_launcher_ends_tells_what_is_known(cluster, monkeypatch) -> None:
    def ended(at: StoreChannel, config: DoctorConfig):
        if at.me.rank == 0:
            raise signal_guards.TerminatedError
        return _reduced(at, config)

    monkeypatch.setattr(links, "all_reduce", ended)
    checks, _ = cluster(0, 1, 2)
    found = _by_name(checks)
    assert found["shared folder"].severity is Severity.ok
    assert "all-reduce" not in found
    assert found["ranks"].severity is Severity.error
    assert "the launcher terminated this rank (SIGTERM) during the checks: another rank has failed" in (
        found["ranks"].message
    )
    assert "/dev/shm" in found["ranks"].remedy


def test_a_dead_folder_of_runs_ends_in_time_and_is_said(cluster, monkeypatch) -> None:
    hung = threading.Event()

    def hangs(runs: str):
        if _rank() == 0 and not hung.wait(8):
            return runs
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(shared_folder, "existing_part", hangs)
    config = DoctorConfig(runs="gone", timeout=1, shared_timeout=0.1)
    check = _by_name(cluster(0, 1, 2, rank0=config)[0])["shared folder"]
    assert check.severity is Severity.error
    assert check.message == "runs=gone: rank 0 cannot write there (no answer within 1 s), so the others were skipped"
    hung.set()
    check = _by_name(cluster(0, 1, 2, rank0=config)[0])["shared folder"]
    assert "Stale file handle" in check.message


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [("torchrun", "--standalone", "--nproc_per_node", "2"), ("deepspeed", "--num_gpus", "2")]
)
def test_two_ranks_of_this_machine_report_once_in_json(verb, tmp_path, launcher) -> None:
    done = verb("doctor", "format=json", "disk_mib=8", "all_reduce_mib=8", start=launcher)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == 1
    report = json.loads(lines[0])
    assert report["ranks"] == 2
    assert len(report["hosts"]) == 1
    found = {check["name"]: check for check in report["checks"]}
    assert len(found) == len(report["checks"])
    assert found["all-reduce"]["value"] > 0
    assert found["all-reduce"]["unit"] == "GB/s"
    assert 0 <= found["clock skew"]["value"] < 1
    assert found["shared folder"]["severity"] == "ok"
    assert "all 2 ranks see" in found["shared folder"]["message"]
    assert list(tmp_path.iterdir()) == []
