"""Verbs in forked processes: a server imports the libraries once, and every verb is a fork of it.

    python forkserver.py <socket>

A request is one JSON line with `script`, `arguments`, `folder`, `environment` and the files `stdout` and `stderr`; the
answer is the exit code. Only for machines without a GPU: CUDA cannot be used after a fork.
"""

import contextlib
import importlib
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "datasets", "sentencepiece", "hydra", "omegaconf")


class ForkServer:
    """Runs verbs in forks of the server, one at a time. Starts the server, and a new one after a timeout."""

    def __init__(self) -> None:
        self._start()

    def _start(self) -> None:
        server_socket, child_socket = socket.socketpair()
        self._socket = server_socket
        self._replies = server_socket.makefile()
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(child_socket.fileno())],
            pass_fds=[child_socket.fileno()],
            env=environment,
            start_new_session=True,
        )
        child_socket.close()

    def _restart(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._server.pid, signal.SIGKILL)  # the server and its fork
        self._server.wait()
        self._replies.close()
        self._socket.close()
        self._start()

    def run(
        self, script: Path, arguments: list[str], folder: Path, environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Like `subprocess.run` of `python script arguments` with captured text.

        Raises:
            subprocess.TimeoutExpired: after `timeout` seconds; the fork is killed.
            RuntimeError: the server ended.
        """
        command = [str(script), *arguments]
        with tempfile.TemporaryDirectory() as outputs:
            files = {name: os.path.join(outputs, name) for name in ("stdout", "stderr")}
            request = {"script": str(script), "arguments": arguments, "folder": str(folder), "environment": environment}
            self._socket.settimeout(timeout)
            try:
                self._socket.sendall((json.dumps(request | files) + "\n").encode())
                reply = self._replies.readline()
            except TimeoutError as error:
                self._restart()
                raise subprocess.TimeoutExpired(command, timeout) from error
            except ConnectionError:
                reply = ""
            if not reply:
                self._restart()
                raise RuntimeError(f"the fork server ended while it ran {' '.join(command)}")
            texts = {name: Path(file).read_text(encoding="utf-8") for name, file in files.items()}
        return subprocess.CompletedProcess(command, int(reply), **texts)


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Answers requests until the connection is closed. In a fork it returns the request, which the caller runs."""
    for line in connection.makefile():
        if (pid := os.fork()) == 0:
            connection.close()
            request: dict[str, Any] = json.loads(line)
            return request
        _, status = os.waitpid(pid, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return None


def prepare_process(request: dict[str, Any]) -> None:
    """Makes this process what `python script arguments` would be before its first import."""
    for number, name in ((1, "stdout"), (2, "stderr")):
        descriptor = os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    os.chdir(request["folder"])
    sys.argv[:] = [request["script"], *request["arguments"]]
    sys.path[0] = str(Path(request["script"]).parent)


if __name__ == "__main__":
    for library in LIBRARIES:
        importlib.import_module(library)
    if (request_of_fork := serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        prepare_process(request_of_fork)
        runpy.run_path(request_of_fork["script"], run_name="__main__")
