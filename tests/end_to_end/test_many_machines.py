"""One run on two hosts with every launcher, and the errors of a disconnected, missing or different host."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from samples import ENGLISH
from tiny_run import prepare_store, short_run_keys
from two_hosts import ADDRESSES, INTERFACE, Hosts, why_not

pytestmark = pytest.mark.netns
ROOT = Path(__file__).parents[2]
TRAIN = str(ROOT / "launch" / "train.py")
STEPS = 24
PORT = 29511


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory):
    if reason := why_not():
        pytest.skip(reason)
    with Hosts(tmp_path_factory.mktemp("shared")) as two_hosts:
        yield two_hosts


@pytest.fixture(scope="module")
def arguments(hosts: Hosts, verbs_of, base_tokenizer: Path) -> list[str]:
    prepare_store(verbs_of(hosts.folder), hosts.folder, base_tokenizer, ENGLISH * 4)
    return [
        *short_run_keys(base_tokenizer, STEPS, 4),
        "recovery.heartbeat_seconds=5",
        "hardware.start_timeout_minutes=1",
    ]


@pytest.fixture(scope="module")
def interface_arguments(arguments: list[str]) -> list[str]:
    """The same with a network interface, for hosts whose names do not resolve."""
    return [*arguments, f"hardware.network_interface={INTERFACE}"]


@pytest.fixture(scope="module")
def single_host_losses(hosts: Hosts, verbs_of, arguments: list[str]) -> list[float]:
    """Losses of two ranks on one host."""
    verbs_of(hosts.folder)("train", "run=one_host", *arguments, start=("torchrun", "--nproc_per_node", "2"))
    return losses(hosts, "one_host")


def rows(hosts: Hosts, run: str) -> list[dict]:
    file = hosts.folder / "runs" / run / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(hosts: Hosts, run: str) -> list[float]:
    metrics_rows = rows(hosts, run)
    assert [row["step"] for row in metrics_rows] == list(range(1, STEPS + 1))
    return [row["loss"] for row in metrics_rows]


def start_deepspeed(hosts: Hosts, *arguments: str) -> list[subprocess.Popen[bytes]]:
    """DeepSpeed's launcher on both hosts, which start the same command with their own `--node_rank`."""
    (hosts.folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    command = [
        "deepspeed",
        "--hostfile",
        "hosts",
        "--no_ssh",
        "--master_addr",
        ADDRESSES[0],
        "--master_port",
        str(PORT),
    ]
    return [hosts.start(host, *command, "--node_rank", str(host), TRAIN, *arguments) for host in (0, 1)]


def start_ranks(hosts: Hosts, name: str, port: int, *commands: tuple[str, ...]) -> list[subprocess.Popen[bytes]]:
    """A rank without a launcher on every host for which there is a command; logs are `<name>-<host>.log`."""
    environment = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "MASTER_ADDR": ADDRESSES[0]}
    return [
        hosts.start(
            host,
            sys.executable,
            *command,
            f"run={name}",
            env=environment | {"RANK": str(host), "MASTER_PORT": str(port)},
            log=f"{name}-{host}.log",
        )
        for host, command in enumerate(commands)
        if command
    ]


def test_torchrun_on_two_hosts_gives_the_losses_of_one(
    hosts: Hosts, interface_arguments: list[str], single_host_losses
) -> None:
    command = [
        "torchrun",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--master_addr",
        ADDRESSES[0],
        "--master_port",
        str(PORT),
    ]
    processes = [
        hosts.start(
            host,
            *command,
            "--node_rank",
            str(host),
            TRAIN,
            "run=torchrun",
            *interface_arguments,
            "hardware.local_cache=disk",
        )
        for host in (0, 1)
    ]
    assert hosts.wait(processes) == [0, 0], hosts.said(0)[-3000:] + hosts.said(1)[-3000:]
    assert losses(hosts, "torchrun") == pytest.approx(single_host_losses, rel=0, abs=1e-6)


def test_deepspeed_over_ssh_gives_the_losses_of_one_host(
    hosts: Hosts, interface_arguments: list[str], single_host_losses
) -> None:
    if missing := [tool for tool in ("sshd", "ssh", "ssh-keygen", "pdsh") if shutil.which(tool) is None]:
        pytest.skip(f"not installed: {', '.join(missing)}")
    (hosts.folder / "hosts").write_text("".join(f"{address} slots=1\n" for address in ADDRESSES))
    environment = hosts.allow_ssh()
    process = hosts.start(
        0, "deepspeed", "--hostfile", "hosts", TRAIN, "run=ssh", *interface_arguments, env=environment
    )
    assert hosts.wait([process]) == [0], hosts.said(0)[-3000:] + hosts.said(0, "sshd.log")
    assert losses(hosts, "ssh") == pytest.approx(single_host_losses, rel=0, abs=1e-6)


def test_a_disconnected_host_is_named_and_the_same_command_resumes(
    hosts: Hosts, interface_arguments: list[str], single_host_losses
) -> None:
    """With DeepSpeed's launcher."""
    processes = start_deepspeed(hosts, "run=cut", *interface_arguments)
    deadline = time.monotonic() + 100
    while not any(row["step"] >= 7 for row in rows(hosts, "cut")):
        assert all(process.poll() is None for process in processes), hosts.said(0)[-3000:]
        assert time.monotonic() < deadline
        time.sleep(0.005)
    hosts.cable("down")
    cut_time = time.monotonic()
    exit_codes = hosts.wait(processes, 60)
    seconds = time.monotonic() - cut_time
    hosts.cable("up")
    assert len(rows(hosts, "cut")) < STEPS
    assert all(code not in (0, None) for code in exit_codes)
    # Five seconds without a heartbeat; then ranks wait for their main threads, and launchers for their ranks.
    assert seconds < 30
    status = json.loads((hosts.folder / "runs" / "cut" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert status["message"].startswith("rank 1 on host-b has been silent for 5 s")
    assert "error: rank 1 on host-b has been silent for 5 s" in hosts.said(0)
    assert f"error: rank 0 on host-a cannot be reached from host-b at {ADDRESSES[0]}:{PORT}" in hosts.said(1)
    assert hosts.wait(start_deepspeed(hosts, "run=cut", *interface_arguments)) == [0, 0], hosts.said(0)[-3000:]
    assert "resumed at step" in hosts.said(0)
    assert losses(hosts, "cut") == pytest.approx(single_host_losses, rel=0, abs=1e-6)


def test_different_and_missing_hosts_have_distinct_errors(hosts: Hosts, interface_arguments: list[str]) -> None:
    """Five starts at once, each with its own fault."""
    checkout = hosts.folder / "checkout"
    for folder in ("fireflyds", "conf", "launch"):
        shutil.copytree(ROOT / folder, checkout / folder, ignore=shutil.ignore_patterns("__pycache__"))
    with (checkout / "fireflyds" / "train" / "loop.py").open("a") as file:
        file.write("# another line\n")
    train = (TRAIN, *interface_arguments)
    short_timeout = (*train, "hardware.start_timeout_minutes=0.2")
    script = (
        f"import sys; sys.path.insert(0, {str(checkout)!r}); sys.argv = sys.argv[1:]; import runpy; "
        "runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    port_holder = hosts.start(
        0, sys.executable, "-c", "import socket, time; s = socket.create_server(('', 29531)); time.sleep(200)"
    )
    processes = [
        *start_ranks(
            hosts, "code", 29521, train, ("-c", script, str(checkout / "launch" / "train.py"), *interface_arguments)
        ),
        *start_ranks(hosts, "config", 29522, train, (*train, "optim.lr=2e-3")),
        *start_ranks(hosts, "absent", 29523, short_timeout, ()),
        *start_ranks(hosts, "taken", 29531, train, ()),
        *start_ranks(hosts, "nobody", 29524, (), short_timeout),
    ]
    exit_codes = hosts.wait(processes)
    port_holder.kill()
    logs = {file.stem: file.read_text() for file in hosts.folder.glob("*-[01].log")}
    # 2: a difference, which a restart does not remove; 1: a missing host, which may appear.
    assert exit_codes == [2, 2, 2, 2, 1, 1, 1], logs
    for rank in "01":
        assert (
            "error: rank 1 on host-b has another code than rank 0 on host-a: fireflyds/train/loop.py. Bring"
            in logs[f"code-{rank}"]
        )
        message = (
            "error: rank 1 on host-b has another configuration than rank 0 on host-a: optim.lr: 0.001 -> 0.002. Give"
        )
        assert message in logs[f"config-{rank}"]
    assert f"rank 1 (node 1) of 2 did not connect to {ADDRESSES[0]}:29523 within 12 s" in logs["absent-0"]
    assert f"{ADDRESSES[0]}:29531: the port is taken on rank 0's host host-a" in logs["taken-0"]
    assert f"{ADDRESSES[0]}:29524: rank 1 on host-b did not reach rank 0 there within 12 s" in logs["nobody-1"]
    assert not any("Traceback" in text for text in logs.values())
    assert not (hosts.folder / "runs" / "code").exists()
