"""With what a run was started: command, commit, libraries."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import fireflyds


def _version(name: str) -> str | None:
    """Of an installed distribution; a source checkout of fireflyds that is on the path need not be installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return fireflyds.__version__ if name == "fireflyds" else None


def provenance() -> dict[str, Any]:
    """The command, the code and the libraries."""
    libraries = ("fireflyds", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "sentencepiece", "numpy")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": git.stdout.strip() or None,
        "libraries": {name: _version(name) for name in libraries},
    }
