"""Ranks that meet before they join: each a thread here, with its own host, code and configuration."""

import re
import socket
import threading
from pathlib import Path

import psutil
import pytest
from threads import each_in_its_thread

from fireflyds import app
from fireflyds.config import TrainConfig
from fireflyds.distributed import clock_offset, network, preflight, rendezvous
from fireflyds.distributed.launcher_env import RankInfo, free_port
from fireflyds.errors import UserError

HOSTS = ["north", "north", "south"]


def _rank() -> int:
    return int(threading.current_thread().name)


def config_of(folder: Path, *more: str) -> TrainConfig:
    found = app.compose(
        "train",
        [
            "run=met",
            f"runs={folder}",
            "data=at_path",
            "data.store=store",
            "model=at_path",
            "model.path=base",
            "optim.steps=1",
            "hardware.start_timeout_minutes=0.02",
            *more,
        ],
    )
    assert isinstance(found, TrainConfig)
    return found


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch):
    """Runs `meet` on those of three ranks that are named; returns what each noted, or was told."""
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(preflight.socket, "gethostname", lambda: HOSTS[_rank()])
    monkeypatch.setattr(rendezvous, "_GRACE", 0.3)

    def run(*present: int, inputs=({"store": "a"},) * 3, **of_rank: TrainConfig) -> dict[int, list[str] | str]:
        port, usual, kept = free_port(), config_of(tmp_path), []
        found: dict[int, list[str] | str] = {}

        def one(rank: int) -> None:
            config = of_rank.get(f"rank{rank}", usual)
            try:
                met, found[rank] = preflight.compare_ranks(
                    RankInfo(rank, 0, 3, "127.0.0.1", port), config, app.to_yaml(config), inputs[rank]
                )
                kept.append(met)
            except UserError as error:
                found[rank] = str(error)

        each_in_its_thread(present, one)
        return found

    return run


def test_ranks_that_agree_go_on_without_a_word(ranks) -> None:
    assert ranks(0, 1, 2) == {0: [], 1: [], 2: []}


def test_a_folder_of_runs_that_cannot_be_written_is_told_to_all(ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = config_of(tmp_path / "file" / "runs")
    found = ranks(0, 1, 2, rank0=config, rank1=config, rank2=config)
    expected = f"runs={tmp_path}/file/runs: cannot be written (Not a directory). Give another runs="
    assert found == dict.fromkeys(range(3), expected)


def test_another_store_is_named(ranks) -> None:
    found = ranks(0, 1, 2, inputs=({"store": "a"}, {"store": "a"}, {"store": "b"}))
    expected = (
        "rank 2 on south has another input than rank 0 on north: store: a -> b. Give the same store and tokenizer "
        "on every host"
    )
    assert found == dict.fromkeys(range(3), expected)


def test_another_configuration_is_named_to_all(ranks, tmp_path: Path) -> None:
    found = ranks(0, 1, 2, rank2=config_of(tmp_path, "optim.lr=3e-3", "hardware.timeout_minutes=7"))
    expected = (
        "rank 2 on south has another configuration than rank 0 on north: hardware.timeout_minutes: 30.0 -> 7.0; "
        "optim.lr: 2e-05 -> 0.003. Give the same command on every host"
    )
    assert re.sub(r"optim.lr: \S+ ->", "optim.lr: 2e-05 ->", found[0]) == expected
    assert found[1] == found[2] == found[0]


def test_another_file_of_the_code_is_named_to_all(ranks, monkeypatch) -> None:
    real = preflight.code_hashes()
    assert {"fireflyds/train/loop.py", "fireflyds_kernels/dispatch.py"} <= real.keys()
    monkeypatch.setattr(
        preflight,
        "code_hashes",
        lambda: real | ({"fireflyds/train/loop.py": "0", "fireflyds/new.py": "1"} if _rank() else {}),
    )
    found = ranks(0, 1, 2)
    assert found[0] == (
        "rank 1 on north has another code than rank 0 on north (2 ranks differ): fireflyds/new.py, "
        "fireflyds/train/loop.py. Bring the checkouts of all hosts to the same commit, or start from a folder that "
        "all hosts mount"
    )
    assert found[2] == found[0]


def test_another_library_is_named(ranks, monkeypatch) -> None:
    real = preflight.installed_version
    monkeypatch.setattr(
        preflight, "installed_version", lambda name: "0.1" if _rank() == 2 and name == "deepspeed" else real(name)
    )
    found = ranks(0, 1, 2)
    assert (
        f"rank 2 on south has another version than rank 0 on north: deepspeed: {real('deepspeed')} -> 0.1." in found[1]
    )


def test_a_rank_that_does_not_come_is_named_to_those_that_did(ranks) -> None:
    found = ranks(0, 1)
    assert re.match(
        r"rank 2 of 3 did not connect to 127\.0\.0\.1:\d+ within 1\.2 s \(hardware\.start_timeout_minutes\)", found[0]
    )
    assert found[1] == found[0]


def test_a_rank_that_comes_twice_is_told(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    place = (3, "127.0.0.1", free_port())
    first = rendezvous.StoreChannel(RankInfo(0, 0, *place), 5)
    first.register()
    rendezvous.StoreChannel(RankInfo(1, 1, *place), 5).register()
    with pytest.raises(
        UserError, match=r"another process has connected to 127.* as the same rank\. Give every host its own"
    ):
        rendezvous.StoreChannel(RankInfo(1, 0, *place), 5).register()


def test_what_was_told_before_a_restart_is_not_heard_after_it(monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    place = (2, "127.0.0.1", free_port())
    before = rendezvous.StoreChannel(RankInfo(0, 0, *place), 5)
    before.set("here/1", "old")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not rendezvous.StoreChannel(RankInfo(1, 0, *place), 5).has("here/1")


@pytest.mark.parametrize("cloned", [False, True])
def test_a_folder_of_runs_that_is_not_shared_is_refused(ranks, tmp_path: Path, monkeypatch, cloned: bool) -> None:
    if cloned:
        monkeypatch.setattr(preflight.socket, "gethostname", lambda: "localhost")
        monkeypatch.setattr(preflight, "boot_id", lambda: HOSTS[_rank()])
    south = "localhost#2" if cloned else "south"
    real = preflight.read_token
    monkeypatch.setattr(
        preflight,
        "read_token",
        lambda runs, timeout, request: (
            real(runs, timeout, request) if _rank() < 2 else {"place": "/elsewhere", "seconds": None, "why": ""}
        ),
    )
    found = ranks(0, 1, 2)
    assert found[0] == (
        f"{tmp_path}: rank 0's file is not seen by rank 2 (on {south}), whose runs folder is /elsewhere. Give runs=<a "
        "folder that every host mounts>, as an absolute path, and start all ranks in the same folder"
    )
    assert found[1] == found[0]


def test_a_clock_that_is_ahead_is_noted_and_no_reason_to_stop(ranks, monkeypatch) -> None:
    monkeypatch.setattr(clock_offset, "measure_offsets", lambda met, payload: {2: (7.0, 0.001)})
    monkeypatch.setattr(clock_offset, "answer_pings", lambda met, payload: None)
    found = ranks(0, 1, 2)
    assert found[0][0].startswith("warning: clock skew: south is 7.000 s ahead of north")
    assert len(found[0]) == 1


def test_the_interface_is_said_to_nccl_and_gloo() -> None:
    said: dict[str, str] = {}
    network.set_network_interface("", said)
    assert said == {}
    network.set_network_interface("lo", said)
    assert said == {"NCCL_SOCKET_IFNAME": "=lo", "GLOO_SOCKET_IFNAME": "lo"}
    network.set_network_interface("lo", said)
    with pytest.raises(UserError, match=r"network_interface=lo, but NCCL_SOCKET_IFNAME=ib0 in the environment\. Unset"):
        network.set_network_interface("lo", {"NCCL_SOCKET_IFNAME": "ib0"})
    there = ", ".join(sorted(psutil.net_if_addrs()))
    with pytest.raises(UserError, match=re.escape(f"this host has no ib77. It has {there};")):
        network.set_network_interface("lo,ib77", {})


def test_a_name_without_an_address_is_told_from_a_host_that_does_not_answer(monkeypatch) -> None:
    def nameless(*ignored, **more):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(rendezvous.socket, "create_connection", nameless)
    with pytest.raises(UserError, match=r"Name or service not known\)\. Enter north in DNS or /etc/hosts of this host"):
        rendezvous.StoreChannel(RankInfo(1, 0, 2, "north", 29500), 0.3)
