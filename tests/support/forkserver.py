"""Verbs in forked processes: a server imports the libraries once, and every verb is a fork of it.

    python forkserver.py <socket>

A request is one JSON line with `script`, `arguments`, `folder`, `environment` and the files `stdout` and `stderr`; the
answer is the exit code. Only for machines without a GPU: CUDA cannot be used after a fork.
"""

import importlib
import json
import os
import runpy
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

LIBRARIES = ("torch", "transformers", "peft", "deepspeed", "datasets", "sentencepiece", "hydra", "omegaconf")


class ForkServer:
    """Starts the server, and runs verbs in forks of it, one at a time."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair()
        self._socket = ours
        self._answers = ours.makefile()
        environment = os.environ | {"DS_ACCELERATOR": "cpu", "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        environment.pop("TRITON_INTERPRET", None)
        self._server = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()], env=environment
        )
        theirs.close()

    def run(
        self, script: Path, arguments: list[str], folder: Path, environment: dict[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str]:
        """Like `subprocess.run` of `python script arguments` with captured text."""
        with tempfile.TemporaryDirectory() as outputs:
            files = {name: os.path.join(outputs, name) for name in ("stdout", "stderr")}
            request = {"script": str(script), "arguments": arguments, "folder": str(folder), "environment": environment}
            self._socket.settimeout(timeout)
            self._socket.sendall((json.dumps(request | files) + "\n").encode())
            code = int(self._answers.readline())
            texts = {name: Path(file).read_text(encoding="utf-8") for name, file in files.items()}
        return subprocess.CompletedProcess([str(script), *arguments], code, **texts)


def serve(connection: socket.socket) -> dict[str, Any] | None:
    """Answers requests until the connection is closed. In a fork it returns the request, which the caller runs."""
    for line in connection.makefile():
        if (pid := os.fork()) == 0:
            connection.close()
            return json.loads(line)  # type: ignore[no-any-return]
        _, status = os.waitpid(pid, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    return None


def become(request: dict[str, Any]) -> None:
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
    if (asked := serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        become(asked)
        runpy.run_path(asked["script"], run_name="__main__")
