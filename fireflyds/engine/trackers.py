"""The door to W&B. Rank 0 only; offline works."""

from pathlib import Path
from typing import Any

from fireflyds.config import Tracker, TrackingConfig
from fireflyds.errors import UserError
from fireflyds.types import StepMetrics


class NoTracker:
    def log(self, metrics: StepMetrics) -> None: ...

    def finish(self) -> None: ...


class WandbTracker:
    """One W&B run per fireflyds run: the run's name is its id, so resuming goes on in the same one."""

    def __init__(self, config: TrackingConfig, run: str, run_dir: Path, resolved: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "tracking=wandb: wandb is not installed. Install it with pip install 'fireflyds[tracking]'"
            ) from error
        name = run.replace("/", "-")
        options: dict[str, Any] = {"mode": config.mode.name, "resume": "allow", "dir": str(run_dir), "config": resolved}
        self._run = wandb.init(project=config.project, entity=config.entity, id=name, name=name, **options)

    def log(self, metrics: StepMetrics) -> None:
        self._run.log(metrics.as_dict(), step=metrics.step)

    def finish(self) -> None:
        self._run.finish()


def open_tracker(
    config: TrackingConfig, run: str, run_dir: Path, resolved: dict[str, Any], rank: int
) -> NoTracker | WandbTracker:
    if rank != 0 or config.kind is Tracker.none:
        return NoTracker()
    try:
        return WandbTracker(config, run, run_dir, resolved)
    except UserError:
        raise
    except Exception as error:  # whatever W&B raises, it is no reason to stop a training run
        print(f"tracking=wandb: W&B did not start ({error}); training goes on without it", flush=True)
        return NoTracker()
