"""The run directory: what was asked (`config.yaml`), with what (`provenance.json`), and by whom it may be resumed."""

import json
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

from fireflyds.config import TrainConfig
from fireflyds.directories import write_whole
from fireflyds.errors import UserError

# Keys that may change between the start of a run and its resumption without making it another run.
FREE_TO_CHANGE = ("tracking", "checkpoint", "log_every", "runs")


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted keys whose values differ, with both values."""
    found = []
    for key in sorted(old.keys() | new.keys()):
        if not prefix and key in FREE_TO_CHANGE:
            continue
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            found += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            found.append(f"{prefix}{key}: {a} -> {b}")
    return found


def open_run(config: TrainConfig, yaml_text: str, resolved: dict[str, Any]) -> Path:
    """Make the run directory, or check that the one there is the same run. On rank 0 only.

    Raises:
        UserError: the name is taken by a run with another configuration; the message lists the differences.
    """
    import yaml

    run_dir = Path(config.run_dir)
    file = run_dir / "config.yaml"
    if file.exists():
        changed = differences(yaml.safe_load(file.read_text(encoding="utf-8")), resolved)
        if changed:
            raise UserError(
                f"run={config.run}: {run_dir} was started with another configuration ({'; '.join(changed)}). Give another run=, or the same values to go on"
            )
        return run_dir
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        write_whole(run_dir / "provenance.json", json.dumps(provenance(), indent=2))
        write_whole(file, yaml_text)
    except OSError as error:
        raise UserError(
            f"run={config.run}: {run_dir} cannot be written ({error.strerror}). Give another run= or runs="
        ) from error
    return run_dir


def provenance() -> dict[str, Any]:
    """The command, the code and the libraries."""
    libraries = ("fireflyds", "torch", "deepspeed", "transformers", "peft", "bitsandbytes", "sentencepiece", "numpy")
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    return {
        "command": [sys.executable, *sys.argv],
        "python": platform.python_version(),
        "platform": platform.platform(),
        "commit": git.stdout.strip() or None,
        "libraries": {name: metadata.version(name) for name in libraries},
    }
