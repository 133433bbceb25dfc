"""Config keys that may change between two starts of a run. Imports nothing heavy, because `submit` uses it too."""

from pathlib import Path
from typing import Any

from fireflyds.app import plain
from fireflyds.errors import UserError
from fireflyds.runs import layout

# Keys that may change between the start of a run and its resumption without making it another run.
FREE_TO_CHANGE = (
    "tracking", "checkpoint", "recovery", "validation", "profile", "log_every", "runs", "optim.steps", "optim.epochs",
    "zero", "micro_batch_size", "hardware.timeout_minutes", "hardware.gradient_checkpointing", "hardware.peak_tflops",
    "hardware.start_timeout_minutes", "hardware.network_interface", "hardware.local_cache",
)  # fmt: skip


def diff_configs(
    old: dict[str, Any], new: dict[str, Any], prefix: str = "", free: tuple[str, ...] = FREE_TO_CHANGE
) -> list[str]:
    """Returns the differing values as `dotted.key: old -> new`, except those of keys in `free`."""
    differences = []
    for key in sorted(old.keys() | new.keys()):
        if f"{prefix}{key}" in free:
            continue
        old_value, new_value = old.get(key), new.get(key)
        if isinstance(old_value, dict) and isinstance(new_value, dict):
            differences += diff_configs(old_value, new_value, f"{prefix}{key}.", free)
        elif old_value != new_value:
            differences.append(f"{prefix}{key}: {old_value} -> {new_value}")
    return differences


def has_started(run_dir: Path) -> bool:
    """True where the run has a checkpoint or a logged step."""
    metrics = run_dir / layout.METRICS
    return any((run_dir / layout.CHECKPOINTS).glob(f"{layout.STEP_PREFIX}*")) or (
        metrics.exists() and metrics.stat().st_size > 0
    )


def require_same_config(run_dir: Path, yaml_text: str, run: str, more: list[str] | None = None) -> None:
    """Raises `UserError` where the run was started with another configuration; `more`: additional differences."""
    file = run_dir / layout.CONFIG
    if not (file.exists() and has_started(run_dir)):
        return
    changed = diff_configs(plain(file.read_text(encoding="utf-8")), plain(yaml_text)) + (more or [])
    if changed:
        raise UserError(
            f"{run_dir} was started with another configuration ({'; '.join(changed)})",
            key="run",
            value=run,
            remedy="Give another run=, or the same values to resume",
        )
