"""Evaluation tasks: one file is one entry, and exports `TASK`.

Its options are the section of its name in `EvaluateConfig`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fireflyds import registry
from fireflyds.config import EvaluateConfig
from fireflyds.evaluation.scorer import EvaluatedModel

PACKAGE = "fireflyds.evaluation.tasks"


@dataclass(frozen=True, slots=True)
class EvaluationTask:
    """`evaluate(model, options, limit)` gives figures by name; `options`: the task's section of `EvaluateConfig`."""

    protocol: str
    """What the figures may be compared with."""
    source: str
    """Where the protocol is described."""
    evaluate: Callable[[EvaluatedModel, Any, int | None], dict[str, float]]
    covers_all: Callable[[Any], bool] = lambda options: True
    """Whether these options ask for all of the task's data."""


def load_task(name: str) -> EvaluationTask:
    """The task of that name.

    Raises:
        UserError: there is none.
    """
    task: EvaluationTask = registry.find(PACKAGE, name, "tasks").TASK
    return task


def task_options(name: str, config: EvaluateConfig) -> Any:
    """The section of a task."""
    return getattr(config, name)
