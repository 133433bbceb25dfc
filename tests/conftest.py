"""Fixtures: a small English base tokenizer, tiny models, and verbs run as from the command line."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Workers share the cores; what they start inherits this.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

if not torch.cuda.is_available():
    # Triton's interpreter replaces the GPU; it must be enabled before Triton is imported.
    os.environ["TRITON_INTERPRET"] = "1"

from bases import sentencepiece_base
from forkserver import ForkServer

from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.sentencepiece_encoder import SentencePieceEncoder

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def base_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer directory trained on English only, with byte fallback."""
    return sentencepiece_base(tmp_path_factory.mktemp("tokenizer") / "base")


@pytest.fixture(scope="session")
def encoder(base_tokenizer: Path) -> SentencePieceEncoder:
    tokenizer_encoder = load_encoder(base_tokenizer)
    assert isinstance(tokenizer_encoder, SentencePieceEncoder)
    return tokenizer_encoder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    """Real tokenizers, corpora and benchmarks; only tests marked `data` may use it."""
    path = os.environ.get("FIREFLYDS_TEST_DATA")
    if not path:
        pytest.skip("FIREFLYDS_TEST_DATA is not set")
    return Path(path)


# Tests of a process from its start: its duration, how it ends, its parent process.
OWN_PROCESS = ("real_process", "slow", "chaos", "slurm", "netns", "data", "gpu")


@pytest.fixture(scope="session")
def fork_server() -> ForkServer | None:
    """A server that has imported the libraries; None on a machine with a GPU."""
    return None if torch.cuda.is_available() else ForkServer()


@pytest.fixture
def verb(request: pytest.FixtureRequest, tmp_path: Path):
    """Runs a verb in `tmp_path`: in a fork that has imported the libraries, or in a process of its own.

    `start` puts a launcher in front. Tests marked `real_process`, and those that are slow anyway, never fork.
    """
    if any(request.node.get_closest_marker(name) for name in OWN_PROCESS):
        return verbs_in(tmp_path)
    return verbs_in(tmp_path, request.getfixturevalue("fork_server"))


@pytest.fixture(scope="session")
def verbs_of():
    """The same for any folder, in processes of their own."""
    return verbs_in


def verbs_in(folder: Path, server: ForkServer | None = None):
    def run(
        name: str, *arguments: str, start: tuple[str, ...] = (), check: bool = True, env: dict[str, str] | None = None
    ):
        script = ROOT / "launch" / f"{name}.py"
        environment = (
            {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
            | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
            | (env or {})
        )
        if server is not None and not start and env is None:
            completed = server.run(script, [*arguments], folder, environment, timeout=280)
        else:
            completed = subprocess.run(
                [*(start or [sys.executable]), str(script), *arguments],
                cwd=folder,
                capture_output=True,
                text=True,
                env=environment,
                timeout=280,
            )
        if check:
            assert completed.returncode == 0, completed.stdout[-2000:] + completed.stderr[-4000:]
        return completed

    return run


# Modules whose fixtures train for a minute: they start first, so that the many short tests fill the other worker.
LONG = ("test_training.py", "test_resume.py", "test_every_verb.py", "test_sharding.py", "test_many_machines.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
