"""A description of the machine, for the header of a result file."""

import importlib.metadata
import os
import platform
import subprocess
from datetime import date
from pathlib import Path


def describe(*packages: str) -> str:
    """One line: processor, cores, versions, commit, day."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in packages)
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=Path(__file__).parent, check=False
    ).stdout.strip()
    return (
        f"{cpu}, {os.cpu_count()} cores, Python {platform.python_version()}, {versions}, commit {commit}, "
        f"{date.today().isoformat()}"
    )
