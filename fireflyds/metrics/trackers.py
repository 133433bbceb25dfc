"""Experiment trackers: W&B and TensorBoard. Rank 0 only. A failing tracker logs one warning; training continues."""

import importlib.util
import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from fireflyds.config import TrackerKind, TrackingConfig, TrainConfig, WandbMode
from fireflyds.errors import UserError
from fireflyds.fs import atomic_write_text, read_json
from fireflyds.runs import layout

_COLUMNS = ("step", "prompt", "text")


class Tracker(Protocol):
    """Receives rows of `metrics.jsonl` and `validation.jsonl`; each contains its `step`."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Records a row."""

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Records generated texts of a step; each row has `prompt` and `text`."""

    def rollback(self, step: int) -> None:
        """Continues after a return to `step`: rows of later steps are logged again."""

    def finish(self, exit_code: int) -> None:
        """Closes the tracker. `exit_code`: 0 where the run succeeded."""


class NoTracker:
    """Discards all rows; used where no tracker is configured."""

    def log(self, row: Mapping[str, Any]) -> None:
        """Does nothing."""

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Does nothing."""

    def rollback(self, step: int) -> None:
        """Does nothing."""

    def finish(self, exit_code: int) -> None:
        """Does nothing."""


class WandbTracker:
    """One W&B run per fireflyds run: its id is stored in the run directory, so a resume continues the same W&B run.

    `step` is logged as a metric of every row, so steps that are logged again after a resume replace the earlier ones.
    """

    def __init__(self, config: TrackingConfig, run: str, run_dir: Path, resolved: dict[str, Any]) -> None:
        self._run = init_wandb(config, run, run_dir, resolved, config.finish_seconds)
        self._run.define_metric("step", hidden=True)
        self._run.define_metric("*", step_metric="step")

    def log(self, row: Mapping[str, Any]) -> None:
        """Logs a row to W&B; of a validation also a table of its domains."""
        self._run.log(dict(row))
        if any(key.startswith("validation/") for key in row):
            self._run.log({"step": row["step"], "validation_table": _domains_table(row)})

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Logs generated texts as a W&B table."""
        import wandb

        table = wandb.Table(columns=list(_COLUMNS), data=[[step, row["prompt"], row["text"]] for row in rows])
        self._run.log({"step": step, "samples": table})

    def rollback(self, step: int) -> None:
        """Does nothing: a step that is logged again replaces the earlier one."""

    def finish(self, exit_code: int) -> None:
        """Ends the W&B run with `exit_code`."""
        self._run.finish(exit_code=exit_code)


class TensorBoardTracker:
    """Event files in `tensorboard/` of the run directory. A resume or rollback hides earlier events of later steps."""

    def __init__(self, run_dir: Path, resumed_at: int) -> None:
        self._folder = str(run_dir / layout.TENSORBOARD)
        self._writer = self._open(resumed_at)

    def _open(self, step: int) -> Any:
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(self._folder, purge_step=step + 1)

    def log(self, row: Mapping[str, Any]) -> None:
        """Writes every number of a row as a scalar at its step."""
        for key, value in row.items():
            if key != "step" and isinstance(value, int | float):
                self._writer.add_scalar(key, value, row["step"])

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Writes prompt and text of each sample as a text entry."""
        for number, row in enumerate(rows):
            self._writer.add_text(f"samples/{number}", f"{row['prompt']}\n\n---\n\n{row['text']}", step)

    def rollback(self, step: int) -> None:
        """Reopens the event file at `step`, so that TensorBoard discards later rows."""
        self._writer.close()
        self._writer = self._open(step)

    def finish(self, exit_code: int) -> None:
        """Closes the event file."""
        self._writer.close()


class FaultTolerantTracker:
    """Wraps a tracker: logs its first exception as a warning and disables it from then on."""

    def __init__(self, tracker: Tracker, name: str, log: logging.Logger, finish_seconds: float) -> None:
        self._tracker: Tracker = tracker
        self._name, self._log, self._finish_seconds = name, log, finish_seconds

    def log(self, row: Mapping[str, Any]) -> None:
        """Calls the wrapped tracker; an exception becomes a warning."""
        self._try(lambda: self._tracker.log(row))

    def log_samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Calls the wrapped tracker; an exception becomes a warning."""
        self._try(lambda: self._tracker.log_samples(step, rows))

    def rollback(self, step: int) -> None:
        """Calls the wrapped tracker; an exception becomes a warning."""
        self._try(lambda: self._tracker.rollback(step))

    def finish(self, exit_code: int) -> None:
        """Waits at most `finish_seconds`; a hanging call is left to its daemon thread, which ends with the process."""
        work = partial(self._try, lambda: self._tracker.finish(exit_code))
        thread = threading.Thread(target=work, name="tracker", daemon=True)
        thread.start()
        thread.join(self._finish_seconds)
        if thread.is_alive():
            self._tracker = NoTracker()
            self._log.warning(f"{self._name} did not finish within {self._finish_seconds:g} s and is abandoned")

    def _try(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:  # an exception of a tracker must not stop a training run
            self._tracker = NoTracker()
            self._log.warning(f"{self._name} failed ({_short(error)}); training continues without it")


def require_installed(config: TrackingConfig) -> None:
    """Raises `UserError` where the tracker's package is not installed. Called before anything is loaded."""
    package = {TrackerKind.none: "", TrackerKind.wandb: "wandb", TrackerKind.tensorboard: "tensorboard"}[config.kind]
    if package and importlib.util.find_spec(package) is None:
        raise UserError(
            f"{package} is not installed",
            key="tracking",
            value=config.kind.name,
            remedy="Install it with pip install 'fireflyds[tracking]', or use tracking=none",
        )


def open_tracker(
    config: TrainConfig, resolved: dict[str, Any], rank: int, resumed_at: int, log: logging.Logger
) -> Tracker:
    """Opens the tracker of this rank. Neither this function nor the tracker's methods raise."""
    tracking, run_dir = config.tracking, Path(config.run_dir)
    if rank != 0 or tracking.kind is TrackerKind.none:
        return NoTracker()
    if tracking.kind is TrackerKind.wandb and tracking.mode is WandbMode.disabled:
        log.info("tracking.mode=disabled: W&B is not started, nothing is tracked")
        return NoTracker()
    name = {TrackerKind.wandb: "W&B", TrackerKind.tensorboard: "TensorBoard"}[tracking.kind]
    try:
        tracker: Tracker = (
            WandbTracker(tracking, config.run, run_dir, resolved)
            if tracking.kind is TrackerKind.wandb
            else TensorBoardTracker(run_dir, resumed_at)
        )
    except Exception as error:
        log.warning(f"{name} did not start ({_short(error)}); training continues without it")
        return NoTracker()
    if tracking.kind is TrackerKind.wandb and tracking.mode is WandbMode.offline:
        log.info(f"W&B is offline: upload the data later with `wandb sync {run_dir / layout.WANDB}/offline-run-*`")
    return FaultTolerantTracker(tracker, name, log, tracking.finish_seconds)


def init_wandb(
    config: TrackingConfig, run: str, run_dir: Path, resolved: dict[str, Any] | None, finish_seconds: float
) -> Any:
    """Starts or resumes the W&B run of a fireflyds run. `finish_seconds`: timeout of its `finish()`; 0: none."""
    import wandb

    group = run.rpartition("/")[0] if config.group is None else config.group
    options: dict[str, Any] = {"entity": config.entity, "group": group or None, "tags": config.tags, "config": resolved}
    options["mode"] = config.mode.name
    return wandb.init(
        project=config.project,
        id=wandb_run_id(run_dir),
        name=run.replace("/", "-"),
        job_type=config.job_type,
        resume="allow",
        dir=str(run_dir),
        settings=wandb.Settings(finish_timeout=finish_seconds),
        **options,
    )


def wandb_run_id(run_dir: Path) -> str:
    """The W&B id shared by all starts of a run. It is not the name, which may be reused for another run."""
    file = run_dir / layout.WANDB_ID
    if not file.exists():
        atomic_write_text(file, json.dumps({"id": secrets.token_hex(4)}))
    return str(read_json(file)["id"])


def require_wandb_run(config: TrackingConfig, run: str) -> None:
    """Raises `UserError` where the run is not tracked by W&B."""
    if config.kind is not TrackerKind.wandb or config.mode is WandbMode.disabled:
        raise UserError(
            f"the run {run} is not tracked by W&B (tracking={config.kind.name}, tracking.mode={config.mode.name})",
            key="artifact",
            value="true",
            remedy="Remove artifact=true",
        )
    require_installed(config)


def log_model_artifact(config: TrackingConfig, run: str, run_dir: Path, folder: Path, metadata: dict[str, Any]) -> str:
    """Uploads an export to its W&B run as an artifact of type `model`. Returns the artifact's name after the upload.

    An offline run stores the artifact on disk until it is synced. `metadata`: that of the artifact.

    Raises:
        UserError: the run is not tracked by W&B, or W&B failed; the export itself is complete.
    """
    require_wandb_run(config, run)
    import wandb

    name = run.replace("/", "-")
    try:
        wandb_run = init_wandb(config, run, run_dir, None, finish_seconds=0)
        artifact = wandb.Artifact(name, type="model", metadata=metadata)
        artifact.add_dir(str(folder))
        logged_artifact = wandb_run.log_artifact(artifact)
        if config.mode is WandbMode.online:
            logged_artifact.wait()
        wandb_run.finish()
    except Exception as error:
        raise UserError(
            f"W&B failed ({_short(error)})",
            key="artifact",
            value="true",
            remedy=f"The export in {folder} is complete; fix this error and run the same command again",
        ) from error
    return name


def _domains_table(row: Mapping[str, Any]) -> Any:
    import wandb

    prefix = "validation/loss/"
    domains = [key.removeprefix(prefix) for key in row if key.startswith(prefix)]
    data = [[row["step"], name, row[prefix + name], row.get(f"validation/bits_per_byte/{name}")] for name in domains]
    return wandb.Table(columns=["step", "domain", "loss", "bits_per_byte"], data=data)


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
