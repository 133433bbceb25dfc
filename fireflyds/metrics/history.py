"""Metric history of a run for `trainer_state.json` and `loss.png`: a few numbers per step, kept in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fireflyds.fs import atomic_write_text
from fireflyds.metrics.plots import plot_loss
from fireflyds.runs import layout

_COLUMNS = ("step", "loss", "lr", "grad_norm", "tokens", "flops")


class History:
    """Rows of `metrics.jsonl` and `validation.jsonl` from the first step on, including those before a resume."""

    def __init__(self, run_dir: Path, total_steps: int, log_every: int, steps_per_epoch: float) -> None:
        self._run_dir, self._total_steps = run_dir, total_steps
        self._log_every, self._steps_per_epoch = log_every, steps_per_epoch
        self._steps: list[dict[str, Any]] = []
        self._validations: list[dict[str, Any]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Adds a row of `metrics.jsonl`."""
        self._steps.append({key: row.get(key) for key in _COLUMNS})

    def add_validation(self, row: Mapping[str, Any]) -> None:
        """Adds a row of `validation.jsonl`."""
        self._validations.append(dict(row))

    def save(self) -> None:
        """Writes both files; does nothing before the first step."""
        steps = self._steps.copy()  # another thread may append rows concurrently
        if not steps:
            return
        atomic_write_text(self._run_dir / layout.TRAINER_STATE, json.dumps(self._trainer_state(steps), indent=2))
        if any(row["loss"] is not None for row in steps):
            plot_loss({self._run_dir.name: steps}, self._run_dir / layout.LOSS_PLOT)

    def _trainer_state(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        """The state in the format of transformers' `TrainerState`, for tools that read it."""
        last = steps[-1]
        return {
            "best_global_step": None,
            "best_metric": None,
            "best_model_checkpoint": None,
            "epoch": self._epoch(last["step"]),
            "global_step": last["step"],
            "is_hyper_param_search": False,
            "is_local_process_zero": True,
            "is_world_process_zero": True,
            "log_history": self._log_history(steps),
            "logging_steps": self._log_every,
            "max_steps": self._total_steps,
            "num_input_tokens_seen": last["tokens"],
            "num_train_epochs": -(-self._total_steps // max(1, round(self._steps_per_epoch))),
            "stateful_callbacks": {},
            "total_flos": sum(row["flops"] or 0.0 for row in steps),
            "trial_name": None,
            "trial_params": None,
        }

    def _epoch(self, step: int) -> float:
        return step / self._steps_per_epoch

    def _log_history(self, steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """One entry per `log_every` steps with their mean loss, and one per validation, sorted by step."""
        entries: list[dict[str, Any]] = []
        recent: list[float] = []
        for row in steps:
            recent += [] if row["loss"] is None else [row["loss"]]
            if row["step"] % self._log_every and row["step"] != self._total_steps:
                continue
            entries.append(
                {
                    "epoch": self._epoch(row["step"]),
                    "grad_norm": row["grad_norm"],
                    "learning_rate": row["lr"],
                    "loss": sum(recent) / len(recent) if recent else None,
                    "step": row["step"],
                }
            )
            recent = []
        for row in self._validations.copy():
            metrics = {
                key.replace("validation/", "eval_").replace("/", "_"): value
                for key, value in row.items()
                if key.startswith("validation/")
            }
            entries.append({"epoch": self._epoch(row["step"]), "step": row["step"], **metrics})
        return sorted(entries, key=lambda entry: entry["step"])
