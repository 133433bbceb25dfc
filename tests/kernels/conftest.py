"""Where there is a GPU the kernels run compiled; elsewhere Triton's interpreter runs the same tests on the CPU."""

import os

import pytest
import torch

# Deterministic mode, which poisons fresh memory, asks this of cuBLAS.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

if not torch.cuda.is_available():
    # As in the fixtures above, which are left out where only torch, triton and pytest are installed.
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def poisoned():
    """Memory that nobody has written yet holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
