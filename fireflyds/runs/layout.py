"""File names of a run directory and exit codes of training."""

import shutil
from pathlib import Path

from fireflyds.errors import UserError
from fireflyds.fs import remove_empty_folders

CONFIG = "config.yaml"
INPUTS = "inputs.json"
PROVENANCE = "provenance.json"
STATUS = "status.json"
LOCK = ".lock"

# States in `status.json`.
RUNNING = "running"
STOPPED = "stopped"
"""The same command resumes the run."""
FINISHED = "finished"
FAILED = "failed"

METRICS = "metrics.jsonl"
VALIDATION = "validation.jsonl"
SAMPLES = "samples.jsonl"
TRAINER_STATE = "trainer_state.json"
LOSS_PLOT = "loss.png"
TRAIN_LOG = "train.log"
LOGS = "logs"
TENSORBOARD = "tensorboard"
WANDB = "wandb"
WANDB_ID = "wandb.json"
PROFILE = "profile"
"""Traces and operator tables of the steps that `profile.start` and `profile.steps` name."""

CHECKPOINTS = "checkpoints"
LATEST = "latest"
"""In `checkpoints/`: the name of the newest checkpoint."""
STEP_PREFIX = "step-"
START = "start"
"""Initial weights, copied from the run that `init_from` names."""
EXPORT = "export"

SAVE_FILE = "SAVE"
"""Created by the user: the run saves a checkpoint after the current step."""
STOP_FILE = "STOP"
"""Created by the user: the run saves a checkpoint and exits with `EXIT_STOPPED`."""

JOBS = "jobs.json"
JOBS_FOLDER = "jobs"
SUBMIT_SCRIPT = "submit.sh"
LAUNCHER_LOG = "logs/launcher.log"
LAUNCHER_PID = "logs/launcher.pid"
REQUEUED_AT = "logs/requeued_at"
"""One line per requeue of a Slurm job: the newest checkpoint at that time."""

EXIT_FAILED = 1
EXIT_USER_ERROR = UserError.exit_code
EXIT_INTERRUPTED = 75
"""The run saved a checkpoint and exited after a signal: a scheduler may run the same command again."""
EXIT_STOPPED = 76
"""The run saved a checkpoint and exited because of `STOP_FILE`: a scheduler must not restart it."""
EXIT_CTRL_C = 130

FILES = (
    CONFIG,
    INPUTS,
    PROVENANCE,
    STATUS,
    LOCK,
    METRICS,
    VALIDATION,
    SAMPLES,
    TRAINER_STATE,
    LOSS_PLOT,
    TRAIN_LOG,
    WANDB_ID,
    JOBS,
    SUBMIT_SCRIPT,
)
FOLDERS = (CHECKPOINTS, START, LOGS, TENSORBOARD, WANDB, PROFILE, JOBS_FOLDER)


def step_name(step: int) -> str:
    """The folder of a checkpoint, such as `step-000100`."""
    return f"{STEP_PREFIX}{step:06d}"


def is_run(folder: Path) -> bool:
    """True for a folder with the configuration and provenance of a run."""
    return (folder / CONFIG).is_file() and (folder / PROVENANCE).is_file()


def log_file(run_dir: Path, rank: int) -> Path:
    """Path of the log of a rank."""
    return run_dir / LOGS / f"rank_{rank}.log"


def remove_run(run_dir: Path) -> None:
    """Removes the files written by a training run; keeps other files in its directory."""
    for name in FILES:
        (run_dir / name).unlink(missing_ok=True)
    for name in FOLDERS:
        shutil.rmtree(run_dir / name, ignore_errors=True)
    remove_empty_folders(run_dir)
