"""A real Slurm on one machine, for tests: two nodes `n1` and `n2` with one core each, started and stopped as a context.

By hand: `python tests/support/slurm_cluster.py` starts it and prints the variable that Slurm's commands need;
Ctrl-C or SIGTERM stops it. Needs Debian's slurmctld, slurmd, slurm-client and munge, and root.
"""

import contextlib
import os
import pwd
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

NODES = ("n1", "n2")
NEEDED = ("slurmctld", "slurmd", "sbatch", "munged")
PATH = f"/usr/sbin:/usr/local/sbin:{os.environ['PATH']}"

CONFIG = """
ClusterName=fireflyds
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
# Two nodes on one machine: no control groups, and both daemons under one hostname.
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=batch_sched_delay=0,bf_interval=1,sched_min_interval=100000,defer_batch
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
JobRequeue=1
# Jobs have this long after SIGTERM, as on real clusters.
KillWait=30
MinJobAge=600
ReturnToService=2
SlurmdTimeout=20
InactiveLimit=0
AccountingStorageType=accounting_storage/none
JobAcctGatherType=jobacct_gather/none
{nodes}
PartitionName=main Nodes=n1,n2 Default=YES MaxTime=60 State=UP PriorityTier=1
PartitionName=urgent Nodes=n1,n2 MaxTime=60 State=UP PriorityTier=10
"""


def missing() -> list[str]:
    """What a machine lacks to run it."""
    missing_tools = [name for name in NEEDED if shutil.which(name, path=PATH) is None]
    return missing_tools + ([] if os.geteuid() == 0 else ["root"])


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
    """Yields the variables that Slurm's commands need."""
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        # Another user's process must reach its socket below.
        os.chmod(folder, 0o755)
        yield from _daemons(Path(folder))


def _daemons(folder: Path) -> Iterator[dict[str, str]]:
    ports = _free_ports(1 + len(NODES))
    nodes = "\n".join(
        (
            f"NodeName={name} NodeHostname={socket.gethostname()} NodeAddr=127.0.0.1 Port={port} CPUs=1 "
            "RealMemory=4000 State=UNKNOWN"
        )
        for name, port in zip(NODES, ports[1:], strict=True)
    )
    config = folder / "slurm.conf"
    config.write_text(
        CONFIG.format(host=socket.gethostname(), controller_port=ports[0], folder=folder, nodes=nodes), encoding="utf-8"
    )
    environment = os.environ | {"SLURM_CONF": str(config), "PATH": PATH}
    with contextlib.ExitStack() as stack:
        _start_munge(folder / "munge", stack)
        _start("controller", ["slurmctld", "-D", "-i"], environment, folder, stack)
        for name in NODES:
            _start(name, ["slurmd", "-D", "-N", name], environment, folder, stack)
        _wait_until_idle(environment, folder)
        try:
            yield {"SLURM_CONF": str(config), "PATH": PATH}
        finally:
            # What still runs must not outlive the daemons.
            subprocess.run(["scancel", "--user", "root", "--signal=KILL", "--full"], env=environment, check=False)
            subprocess.run(["scancel", "--user", "root"], env=environment, check=False)
            _wait_until_empty(environment)


def _start_munge(folder: Path, stack: contextlib.ExitStack) -> None:
    user = pwd.getpwnam("munge")
    folder.mkdir()
    key = folder / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    for path in (folder, key):
        os.chown(path, user.pw_uid, user.pw_gid)
    files = [f"--{name}={folder}/{name.split('-')[0]}" for name in ("key-file", "log-file", "pid-file", "seed-file")]
    command = ["munged", "--foreground", f"--socket={folder}/socket", *files]
    _start("munged", command, os.environ | {"PATH": PATH}, folder, stack, user="munge")
    deadline = time.monotonic() + 20
    while not (folder / "socket").exists():
        assert time.monotonic() < deadline, (folder / "munged.out").read_text()
        time.sleep(0.05)


def _start(
    name: str,
    command: list[str],
    environment: dict[str, str],
    folder: Path,
    stack: contextlib.ExitStack,
    user: str | None = None,
) -> None:
    log = stack.enter_context((folder / f"{name}.out").open("w"))
    process = subprocess.Popen(
        command, env=environment, stdout=log, stderr=subprocess.STDOUT, user=user, group=user, start_new_session=True
    )
    stack.callback(_stop, process)


def _stop(process: "subprocess.Popen[bytes]") -> None:
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _wait_until_idle(environment: dict[str, str], folder: Path) -> None:
    deadline = time.monotonic() + 60
    while True:
        command = ["sinfo", "--noheader", "--Node", "--partition=main", "--format=%t"]
        states = subprocess.run(command, env=environment, capture_output=True, text=True)
        if states.stdout.split() == ["idle"] * len(NODES):
            return
        if time.monotonic() > deadline:
            logs = "\n".join(f"{file}:\n{file.read_text()[-2000:]}" for file in folder.glob("*.log"))
            raise RuntimeError(f"Slurm did not come up: {states.stdout}{states.stderr}\n{logs}")
        time.sleep(0.2)


def _wait_until_empty(environment: dict[str, str]) -> None:
    deadline = time.monotonic() + 40
    while time.monotonic() < deadline:
        if not subprocess.run(["squeue", "--noheader"], env=environment, capture_output=True, text=True).stdout.strip():
            return
        time.sleep(0.2)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for sock in sockets:
            sock.bind(("127.0.0.1", 0))
        return [sock.getsockname()[1] for sock in sockets]


if __name__ == "__main__":
    if missing_tools := missing():
        sys.exit(f"missing: {', '.join(missing_tools)}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with running() as variables, contextlib.suppress(KeyboardInterrupt):
        print(f"export SLURM_CONF={variables['SLURM_CONF']}", flush=True)
        signal.pause()
