"""Creates or reopens a run directory, exclusively for one process."""

import json
import shutil
from pathlib import Path
from typing import IO, Any

from fireflyds.config import TrainConfig
from fireflyds.errors import UserError
from fireflyds.fs import atomic_write_text, lock_file, read_json
from fireflyds.runs import layout
from fireflyds.runs.config_diff import diff_configs, has_started, require_same_config
from fireflyds.runs.provenance import provenance


def open_run(config: TrainConfig, yaml_text: str, inputs: dict[str, Any], precision: str) -> IO[str]:
    """Creates the run directory, or checks that the existing one belongs to the same run. Rank 0 only.

    `inputs`: content hashes of the run's inputs (token store and base), which must be the same on resume. `precision`:
    the number format that it trains in here, recorded for the export.
    Returns a lock that excludes other processes until it is closed.

    Raises:
        UserError: another process trains the run; or the name is taken by a run with another configuration or
            other inputs, and the message lists the differences.
    """
    run_dir = Path(config.run_dir)
    file = run_dir / layout.CONFIG
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        remedy = "Wait for it, end it, or give another run="
        busy = UserError(f"another process trains {run_dir} now", key="run", value=config.run, remedy=remedy)
        lock = lock_file(run_dir / layout.LOCK, busy)
    except OSError as error:
        raise UserError(
            f"{run_dir} cannot be written ({error.strerror})",
            key="run",
            value=config.run,
            remedy="Give another run= or runs=",
        ) from error
    if file.exists() and has_started(run_dir):
        recorded = read_json(run_dir / layout.INPUTS)
        recorded.pop("precision", None)
        require_same_config(run_dir, yaml_text, config.run, diff_configs(recorded, inputs))
        atomic_write_text(run_dir / layout.INPUTS, json.dumps(inputs | {"precision": precision}, indent=2))
        atomic_write_text(file, yaml_text)
        return lock
    # A run that failed before its first step does not reserve its name.
    shutil.rmtree(run_dir / layout.START, ignore_errors=True)
    atomic_write_text(run_dir / layout.PROVENANCE, json.dumps(provenance(), indent=2))
    atomic_write_text(run_dir / layout.INPUTS, json.dumps(inputs | {"precision": precision}, indent=2))
    atomic_write_text(file, yaml_text)
    return lock
