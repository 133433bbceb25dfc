"""Provenance of a run: command, commit and library versions."""

import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import fireflyds


def installed_version(name: str) -> str | None:
    """Version of an installed distribution, or None; for fireflyds also that of an uninstalled source checkout."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return fireflyds.__version__ if name == "fireflyds" else None


def provenance() -> dict[str, Any]:
    """Returns the command, the platform, the commit and the library versions."""
    libraries = ("fireflyds", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "sentencepiece", "numpy")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": git.stdout.strip() or None,
        "libraries": {name: installed_version(name) for name in libraries},
    }
