"""Two "hosts" on one machine: network namespaces with a cable between them, each with a name of its own."""

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


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


def why_not() -> str:
    """Why there can be no namespaces here; empty where there can."""
    for tool in ("ip", "unshare", "taskset"):
        if shutil.which(tool) is None:
            return f"`{tool}` is not installed"
    probe = f"fireflyds-probe-{os.getpid()}"
    try:
        _ip("netns", "add", probe)
        _ip("-n", probe, "link", "add", "left", "type", "veth", "peer", "name", "right")
        words = ["ip", "netns", "exec", probe, "unshare", "--uts", "hostname", "host-a"]
        subprocess.run(words, check=True, capture_output=True, text=True)
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not allowed here: {error.stderr.strip()}"
    finally:
        subprocess.run(["ip", "netns", "delete", probe], capture_output=True)
    return ""


class Hosts:
    """Used as a context. What was started there ends with it, and the namespaces go."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._spaces = [f"fireflyds-{name}-{os.getpid()}" for name in NAMES]
        self._started: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Hosts":
        try:
            self._build()
        except BaseException:
            self.__exit__()
            raise
        return self

    def _build(self) -> None:
        for space in self._spaces:
            _ip("netns", "add", space)
        first, second = self._spaces
        # Made inside the namespaces, so that no name and no address of this machine is in the way.
        _ip("link", "add", INTERFACE, "netns", first, "type", "veth", "peer", "name", INTERFACE, "netns", second)
        for space, address in zip(self._spaces, ADDRESSES, strict=True):
            _ip("-n", space, "address", "add", f"{address}/24", "dev", INTERFACE)
            _ip("-n", space, "link", "set", "lo", "up")
            _ip("-n", space, "link", "set", INTERFACE, "up")

    def __exit__(self, *trouble: object) -> None:
        for process in self._started:
            # What its launcher started is of its group; it may be gone already.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        for space in self._spaces:
            left = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True).stdout.split()
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)

    def start(
        self, host: int, *words: str, env: Mapping[str, str] | None = None, log: str = ""
    ) -> subprocess.Popen[bytes]:
        """A command on a host, in the shared folder. What it says is added to the file `log`, else to the host's."""
        # A core each, as if they were two: their threads would wait for each other.
        cores = sorted(os.sched_getaffinity(0))
        named = f'taskset -p -c {cores[host % len(cores)]} $$ >/dev/null; hostname {NAMES[host]}; exec "$@"'
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
        environment |= {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"} | dict(env or {})
        with (self.folder / (log or f"{NAMES[host]}.log")).open("ab") as out:
            process = subprocess.Popen(
                ["ip", "netns", "exec", self._spaces[host], "unshare", "--uts", "sh", "-c", named, "sh", *words],
                cwd=self.folder,
                env=environment,
                stdout=out,
                stderr=out,
                start_new_session=True,
            )
        self._started.append(process)
        return process

    def allow_ssh(self) -> dict[str, str]:
        """A server on both hosts, with keys of its own in a folder of its own. Returns the environment to call it
        from."""
        place = self.folder / "ssh"
        place.mkdir()
        for key in ("host", "user"):
            subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(place / key)], check=True)
        shutil.copy(place / "user.pub", place / "authorized")
        (place / "server").write_text(
            f"HostKey {place}/host\nAuthorizedKeysFile {place}/authorized\nStrictModes no\nUsePAM no\nPidFile none\n"
            "PermitRootLogin yes\n"
        )
        (place / "client").write_text(
            f"IdentityFile {place}/user\n"
            "IdentitiesOnly yes\n"
            "StrictHostKeyChecking no\n"
            f"UserKnownHostsFile {place}/known\n"
            "LogLevel ERROR\n"
        )
        # The server wants a folder of the system; it gets one that nobody else sees. The client would read the user's
        # own settings, wherever HOME is.
        serve = f"mount -t tmpfs tmpfs /run && mkdir /run/sshd && exec {shutil.which('sshd')} -D -e -f {place}/server"
        for host in (0, 1):
            self.start(host, "sh", "-c", serve, log="sshd.log")
        (place / "ssh").write_text(f'#!/bin/sh\nexec {shutil.which("ssh")} -F {place}/client "$@"\n')
        (place / "ssh").chmod(0o755)
        return {"PATH": f"{place}{os.pathsep}{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}

    def said(self, host: int, log: str = "") -> str:
        return (self.folder / (log or f"{NAMES[host]}.log")).read_text()

    def cable(self, state: str) -> None:
        """`up` or `down`."""
        _ip("-n", self._spaces[1], "link", "set", INTERFACE, state)

    def wait(self, processes: list[subprocess.Popen[bytes]], seconds: float = 120.0) -> list[int]:
        """Exit codes."""
        until = time.monotonic() + seconds
        return [process.wait(max(0.1, until - time.monotonic())) for process in processes]
