"""The comparison of ranks before training. Each rank is a thread here, with its own host, code and configuration."""

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


def compose_config(folder: Path, *overrides: str) -> TrainConfig:
    config = app.compose(
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
            *overrides,
        ],
    )
    assert isinstance(config, TrainConfig)
    return config


@pytest.fixture
def ranks(tmp_path: Path, monkeypatch):
    """Runs `compare_ranks` on the given ones of three ranks; returns the notes of each, or its error message."""
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_RESTART_COUNT"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(preflight.socket, "gethostname", lambda: HOSTS[_rank()])
    monkeypatch.setattr(rendezvous, "_GRACE", 0.3)

    def run(
        *present_ranks: int, inputs=({"store": "a"},) * 3, **config_by_rank: TrainConfig
    ) -> dict[int, list[str] | str]:
        port, default_config, channels = free_port(), compose_config(tmp_path), []
        outcomes: dict[int, list[str] | str] = {}

        def compare_rank(rank: int) -> None:
            config = config_by_rank.get(f"rank{rank}", default_config)
            try:
                channel, outcomes[rank] = preflight.compare_ranks(
                    RankInfo(rank, 0, 3, "127.0.0.1", port), config, app.to_yaml(config), inputs[rank]
                )
                channels.append(channel)
            except UserError as error:
                outcomes[rank] = str(error)

        each_in_its_thread(present_ranks, compare_rank)
        return outcomes

    return run


def test_identical_ranks_give_no_note(ranks) -> None:
    assert ranks(0, 1, 2) == {0: [], 1: [], 2: []}


def test_an_unwritable_runs_folder_is_reported_on_every_rank(ranks, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = compose_config(tmp_path / "file" / "runs")
    outcomes = ranks(0, 1, 2, rank0=config, rank1=config, rank2=config)
    expected = f"runs={tmp_path}/file/runs: cannot be written (Not a directory). Give another runs="
    assert outcomes == dict.fromkeys(range(3), expected)


def test_a_different_store_is_named_on_every_rank(ranks) -> None:
    outcomes = ranks(0, 1, 2, inputs=({"store": "a"}, {"store": "a"}, {"store": "b"}))
    expected = (
        "rank 2 on south has another input than rank 0 on north: store: a -> b. Give the same store and tokenizer "
        "on every host"
    )
    assert outcomes == dict.fromkeys(range(3), expected)


def test_a_different_configuration_is_named_on_every_rank(ranks, tmp_path: Path) -> None:
    outcomes = ranks(0, 1, 2, rank2=compose_config(tmp_path, "optim.lr=3e-3", "hardware.timeout_minutes=7"))
    expected = (
        "rank 2 on south has another configuration than rank 0 on north: hardware.timeout_minutes: 30.0 -> 7.0; "
        "optim.lr: 2e-05 -> 0.003. Give the same command on every host"
    )
    assert re.sub(r"optim.lr: \S+ ->", "optim.lr: 2e-05 ->", outcomes[0]) == expected
    assert outcomes[1] == outcomes[2] == outcomes[0]


def test_a_different_source_file_is_named_on_every_rank(ranks, monkeypatch) -> None:
    original = preflight.code_hashes()
    assert {"fireflyds/train/loop.py", "fireflyds_kernels/dispatch.py"} <= original.keys()
    monkeypatch.setattr(
        preflight,
        "code_hashes",
        lambda: original | ({"fireflyds/train/loop.py": "0", "fireflyds/new.py": "1"} if _rank() else {}),
    )
    outcomes = ranks(0, 1, 2)
    assert outcomes[0] == (
        "rank 1 on north has another code than rank 0 on north (2 ranks differ): fireflyds/new.py, "
        "fireflyds/train/loop.py. Bring the checkouts of all hosts to the same commit, or start from a folder that "
        "all hosts mount"
    )
    assert outcomes[2] == outcomes[0]


def test_a_different_library_version_is_named(ranks, monkeypatch) -> None:
    original = preflight.installed_version
    monkeypatch.setattr(
        preflight, "installed_version", lambda name: "0.1" if _rank() == 2 and name == "deepspeed" else original(name)
    )
    outcomes = ranks(0, 1, 2)
    assert (
        f"rank 2 on south has another version than rank 0 on north: deepspeed: {original('deepspeed')} -> 0.1."
        in outcomes[1]
    )


def test_a_missing_rank_is_named_on_the_connected_ranks(ranks) -> None:
    outcomes = ranks(0, 1)
    assert re.match(
        r"rank 2 of 3 did not connect to 127\.0\.0\.1:\d+ within 1\.2 s \(hardware\.start_timeout_minutes\)",
        outcomes[0],
    )
    assert outcomes[1] == outcomes[0]


def test_a_rank_that_registers_twice_is_refused(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    world = (3, "127.0.0.1", free_port())
    first = rendezvous.StoreChannel(RankInfo(0, 0, *world), 5)
    first.register()
    rendezvous.StoreChannel(RankInfo(1, 1, *world), 5).register()
    with pytest.raises(
        UserError, match=r"another process has connected to 127.* as the same rank\. Give every host its own"
    ):
        rendezvous.StoreChannel(RankInfo(1, 0, *world), 5).register()


def test_values_set_before_a_restart_are_not_visible_after_it(monkeypatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    world = (2, "127.0.0.1", free_port())
    channel = rendezvous.StoreChannel(RankInfo(0, 0, *world), 5)
    channel.set("here/1", "old")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not rendezvous.StoreChannel(RankInfo(1, 0, *world), 5).has("here/1")


@pytest.mark.parametrize("cloned", [False, True])
def test_a_runs_folder_that_is_not_shared_is_refused(ranks, tmp_path: Path, monkeypatch, cloned: bool) -> None:
    if cloned:
        monkeypatch.setattr(preflight.socket, "gethostname", lambda: "localhost")
        monkeypatch.setattr(preflight, "boot_id", lambda: HOSTS[_rank()])
    host_name = "localhost#2" if cloned else "south"
    original = preflight.read_token
    monkeypatch.setattr(
        preflight,
        "read_token",
        lambda runs, timeout, request: (
            original(runs, timeout, request) if _rank() < 2 else {"place": "/elsewhere", "seconds": None, "why": ""}
        ),
    )
    outcomes = ranks(0, 1, 2)
    assert outcomes[0] == (
        f"{tmp_path}: rank 0's file is not seen by rank 2 (on {host_name}), whose runs folder is /elsewhere. Give "
        "runs=<a folder that every host mounts>, as an absolute path, and start all ranks in the same folder"
    )
    assert outcomes[1] == outcomes[0]


def test_a_clock_that_is_ahead_is_a_warning(ranks, monkeypatch) -> None:
    monkeypatch.setattr(clock_offset, "measure_offsets", lambda channel, payload: {2: (7.0, 0.001)})
    monkeypatch.setattr(clock_offset, "answer_pings", lambda channel, payload: None)
    outcomes = ranks(0, 1, 2)
    assert outcomes[0][0].startswith("warning: clock skew: south is 7.000 s ahead of north")
    assert len(outcomes[0]) == 1


def test_the_network_interface_is_set_for_nccl_and_gloo() -> None:
    environment: dict[str, str] = {}
    network.set_network_interface("", environment)
    assert environment == {}
    network.set_network_interface("lo", environment)
    assert environment == {"NCCL_SOCKET_IFNAME": "=lo", "GLOO_SOCKET_IFNAME": "lo"}
    network.set_network_interface("lo", environment)
    with pytest.raises(UserError, match=r"network_interface=lo, but NCCL_SOCKET_IFNAME=ib0 in the environment\. Unset"):
        network.set_network_interface("lo", {"NCCL_SOCKET_IFNAME": "ib0"})
    interfaces = ", ".join(sorted(psutil.net_if_addrs()))
    with pytest.raises(UserError, match=re.escape(f"this host has no ib77. It has {interfaces};")):
        network.set_network_interface("lo,ib77", {})


def test_a_host_name_that_does_not_resolve_has_a_message_of_its_own(monkeypatch) -> None:
    def fail_to_resolve(*ignored, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(rendezvous.socket, "create_connection", fail_to_resolve)
    with pytest.raises(UserError, match=r"Name or service not known\)\. Enter north in DNS or /etc/hosts of this host"):
        rendezvous.StoreChannel(RankInfo(1, 0, 2, "north", 29500), 0.3)
