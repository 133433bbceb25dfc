"""Writes the results of a study: a table, charts, and the best values as an option file and as a command."""

import csv
import io
import shlex
from collections.abc import Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml

from fireflyds.cluster.sweep import ranges
from fireflyds.cluster.sweep.study import Study, draw_charts, trial_name
from fireflyds.config import SearchConfig
from fireflyds.fs import atomic_write_text
from fireflyds.runs import layout


def write(study: Study, search: SearchConfig, name: str, folder: Path, overrides: Sequence[str]) -> str:
    """Writes `trials.csv`, `trials.md`, `best.yaml` and charts. Returns the text to print.

    Args:
        study: the study, of which trials may still be running.
        overrides: those that are passed on to `train`.
    """
    keys = list(search.space)
    header = ["trial", "outcome", *keys, search.metric, "steps", "tokens", "seconds", "run", "message"]
    rows = [_row(trial, keys, name) for trial in study.trials]
    stream = io.StringIO()
    csv.writer(stream, lineterminator="\n").writerows([header, *rows])
    atomic_write_text(folder / "trials.csv", stream.getvalue())
    summary = _table(header[:-1], [row[:-1] for row in rows])
    parts = [
        f"# {name}",
        "",
        f"{search.sampler.name}, {search.pruner.name}, {search.direction.name} {search.value.name} {search.metric}",
        "",
        summary,
    ]
    best = study.best
    if best is not None:
        fixed_arguments = [word for word in overrides if word.partition("=")[0] not in best.params]
        arguments = [*fixed_arguments, *ranges.words(best.params)]
        command = f"python launch/train.py {shlex.join(arguments)} run=<name>"
        parts += ["", f"Best: trial {best.number}, {search.metric} {best.value:.5f}:", "", "```", command, "```"]
        atomic_write_text(
            folder / "best.yaml",
            option_file(best.params, f"Trial {best.number} of {name}: {search.metric} {best.value:.5f}."),
        )
        summary += (
            f"\nbest: trial {best.number}, {search.metric} {best.value:.5f}\n  {command}\n  as options: "
            f"{folder / 'best.yaml'}"
        )
        chart_paths = draw_charts(study, folder, search.metric)
        parts += ["", *(f"![{path.stem}]({path.name})" for path in chart_paths)]
    atomic_write_text(folder / "trials.md", "\n".join(parts) + "\n")
    return f"{summary}\n  table and charts: {folder / 'trials.md'}"


def _row(trial: Any, keys: Sequence[str], name: str) -> list[Any]:
    attributes = trial.user_attrs
    value = attributes.get("last_value")
    return [
        trial.number,
        attributes.get("outcome", layout.RUNNING),
        *(_short(trial.params[key]) for key in keys),
        "" if value is None else f"{value:.5f}",
        attributes.get("steps", ""),
        attributes.get("tokens", ""),
        attributes.get("seconds", ""),
        f"{name}/{trial_name(trial.number)}",
        attributes.get("message", ""),
    ]


def _short(value: Any) -> Any:
    return f"{value:.4g}" if isinstance(value, float) else value


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)


def option_file(params: dict[str, Any], comment: str) -> str:
    """Returns an option file with the swept keys only, for `conf/experiment/` or `conf/local/default.yaml`."""
    nested: dict[str, Any] = {}
    for key, value in params.items():
        if is_dataclass(ranges.type_of(key)):  # an option, such as optim=muon
            nested.setdefault("defaults", []).append({f"override /{key}": value})
            continue
        *sections, last = key.split(".")
        section_values = nested
        for section in sections:
            section_values = section_values.setdefault(section, {})
        section_values[last] = value
    return f"# @package _global_\n# {comment}\n{yaml.safe_dump(nested, sort_keys=False, allow_unicode=True)}"
