"""With a GPU the kernels run compiled; without one Triton's interpreter runs the same tests on the CPU."""

import os

import pytest
import torch

# cuBLAS requires this in deterministic mode, which fills uninitialised memory.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if not torch.cuda.is_available():
    # As in tests/conftest.py, which is not loaded where only torch, triton and pytest are installed.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned():
    """Uninitialised memory is filled with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
