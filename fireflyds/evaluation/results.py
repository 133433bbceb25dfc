"""`scores.json`: every evaluation of a model, with all that its figures depend on, appended to those before."""

import json
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fireflyds.errors import UserError
from fireflyds.fs import atomic_write_text, read_json
from fireflyds.runs.provenance import installed_version

FILE = "scores.json"
_LIBRARIES = ("fireflyds", "torch", "transformers", "tokenizers", "sentencepiece")


@dataclass(frozen=True, slots=True)
class EvaluationResult:
    """One task on one model. `complete`: on all of its data, neither limited nor on some subjects alone."""

    task: str
    model: str
    protocol: str
    source: str
    figures: dict[str, float]
    options: dict[str, Any]
    """The task's own section, and `limit`, `max_tokens` and the prompt style that was used."""
    complete: bool
    weights: str
    """Hash of the model's weights: results stay in the folder of a model that is exported again."""
    versions: dict[str, str | None]
    time: float = field(default_factory=time.time)


def versions() -> dict[str, str | None]:
    """Versions of the libraries that figures may depend on."""
    return {name: installed_version(name) for name in _LIBRARIES}


def read_results(folder: Path) -> list[EvaluationResult]:
    """The results in a folder, oldest first.

    Raises:
        UserError: `scores.json` is damaged, or of another version.
    """
    file = folder / FILE
    if not file.is_file():
        return []
    try:
        return [EvaluationResult(**row) for row in read_json(file)["results"]]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"is not a list of results ({error})",
            key=file,
            remedy="Another version wrote it, or it was edited: move it elsewhere",
        ) from error


def append_result(folder: Path, result: EvaluationResult) -> None:
    """Appends a result to the results file in `folder`, which is created if absent."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [asdict(row) for row in [*read_results(folder), result]]
    atomic_write_text(folder / FILE, json.dumps({"results": rows}, ensure_ascii=False, indent=2))


def latest_figures(folder: Path, task: str) -> dict[str, float]:
    """Figures of the newest complete result of a task.

    Raises:
        UserError: there is none.
    """
    for result in reversed(read_results(folder)):
        if result.task == task and result.complete:
            return result.figures
    raise UserError(
        f"no complete result of {task}", key=folder / FILE, remedy=f"Evaluate it with tasks=[{task}] and without limit="
    )
