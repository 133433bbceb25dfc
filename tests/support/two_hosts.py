"""Two "hosts" on one machine: network namespaces with hostnames of their own and a virtual Ethernet link."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

NAMES = ("host-a", "host-b")
ADDRESSES = ("10.213.0.1", "10.213.0.2")
INTERFACE = "cable0"


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why network namespaces are not available; empty if they are."""
    for tool in ("ip", "unshare", "taskset"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed"
    probe = f"fireflyds-probe-{os.getpid()}"
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", "left", "type", "veth", "peer", "name", "right")
        command = ["ip", "netns", "exec", probe, "unshare", "--uts", "hostname", "host-a"]
        subprocess.run(command, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return ""


class Hosts:
    """Used as a context. What was started there ends with it, and the namespaces go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._namespaces = [f"fireflyds-{name}-{os.getpid()}" for name in NAMES]
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Hosts":
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        for namespace in self._namespaces:
            _ip("netns", "add", namespace)
        first, second = self._namespaces
        # Created inside the namespaces, so that names and addresses of this machine cannot conflict.
        _ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for namespace, address in zip(self._namespaces, ADDRESSES, strict=True):
            _ip("-n", namespace, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", namespace, "link", "set", "lo", "up")
            _ip("-n", namespace, "link", "set", INTERFACE, "up")

    def __exit__(self, *exception: object) -> None:
        for process in self._processes:
            # What its launcher started is of its group; it may be gone already.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for namespace in self._namespaces:
            pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True).stdout.split()
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", namespace], capture_output=True)

    def start(
        self, host: int, *command: str, env: Mapping[str, str] | None = None, log: str = ""
    ) -> subprocess.Popen[bytes]:
        """Starts a command on a host, in the shared folder. Its output goes to `log`, by default the host's log."""
        # One core per host, so that their threads do not compete.
        cores = sorted(os.sched_getaffinity(0))
        script = f'taskset -p -c {cores[host % len(cores)]} $$ >/dev/null; hostname {NAMES[host]}; exec "$@"'
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | dict(env or {})
        with (self.folder / (log or f"{NAMES[host]}.log")).open("ab") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._namespaces[host], "unshare", "--uts", "sh", "-c", script, "sh", *command],
                cwd=self.folder,
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._processes.append(process)
        return process

    def allow_ssh(self) -> dict[str, str]:
        """A server on both hosts, with keys of its own in a folder of its own. Returns the environment to call it
        from."""
        ssh_folder = self.folder / "ssh"
        ssh_folder.mkdir()
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(ssh_folder / key)], check=True)
        shutil.copy(ssh_folder / "user.pub", ssh_folder / "authorized")
        (ssh_folder / "server").write_text(
            f"HostKey {ssh_folder}/host\nAuthorizedKeysFile {ssh_folder}/authorized\n"
            "StrictModes no\nUsePAM no\nPidFile none\n"
            "PermitRootLogin yes\n"
        )
        (ssh_folder / "client").write_text(
            f"IdentityFile {ssh_folder}/user\n"
            "IdentitiesOnly yes\n"
            "StrictHostKeyChecking no\n"
            f"UserKnownHostsFile {ssh_folder}/known\n"
            "LogLevel ERROR\n"
        )
        # The server needs a system folder; it gets a private mount. The client would read the user's
        # own settings, wherever HOME is.
        server_command = (
            f"mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec {shutil.which('sshd')} -D -e -f {ssh_folder}/server"
        )
        for host in (0, 1):
            self.start(host, "sh", "-c", server_command, log="sshd.log")
        (ssh_folder / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {ssh_folder}/client "$@"\n')
        (ssh_folder / "ssh").chmod(0o755)
        return {"PATH": f"{ssh_folder}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def said(self, host: int, log: str = "") -> str:
        return (self.folder / (log or f"{NAMES[host]}.log")).read_text()

    def cable(self, state: str) -> None:
        """`up` or `down`."""
        _ip("-n", self._namespaces[1], "link", "set", INTERFACE, state)

    def wait(self, processes: list[subprocess.Popen[bytes]], seconds: float = 120.0) -> list[int]:
        """Exit codes."""
        deadline = time.monotonic() + seconds
        return [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
