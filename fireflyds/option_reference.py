"""The reference of options, read from the docstrings under the fields of `config/`."""

import ast
import dataclasses
import enum
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_type_hints

from omegaconf import MISSING

from fireflyds import config


def field_docs(schema: type) -> dict[str, str]:
    """The docstring under each field of a dataclass, inherited ones too."""
    body = ast.parse(inspect.getsource(schema)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {name: text for base in schema.__bases__ if base is not object for name, text in field_docs(base).items()}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            docs[field.target.id] = " ".join(str(below.value.value).split())
    return docs


def options(schema: type, prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Every key a person can type for a schema: dotted name, default, meaning."""
    docs, types = field_docs(schema), get_type_hints(schema)
    for field in dataclasses.fields(schema):
        if dataclasses.is_dataclass(types[field.name]):
            yield from options(types[field.name], f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, _default(field), docs[field.name]


def _default(field: dataclasses.Field[Any]) -> str:
    value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
    if value == MISSING:
        return "required"
    if isinstance(value, enum.Enum):
        return value.name
    return "null" if value is None else '""' if value == "" else str(value)


def choices(conf: Path, schema: type) -> dict[str, list[str]]:
    """Option files by configuration group, for the groups that a schema has."""
    groups = [name for name, kind in get_type_hints(schema).items() if dataclasses.is_dataclass(kind)]
    if issubclass(schema, config.TrainConfig):
        groups.append("experiment")
    return {group: files for group in groups if (files := sorted(p.stem for p in (conf / group).glob("*.yaml")))}


def help_text(verb: str, about: str, conf: Path) -> str:
    """What `-h` prints."""
    schema = config.VERBS[verb].config
    lines = [about.strip(), "", "Keys (key=value; `--cfg job` prints the composed configuration):"]
    rows = list(options(schema))
    width = max(len(key) for key, _, _ in rows)
    lines += [f"  {key:<{width}}  {meaning} [{default}]" for key, default, meaning in rows]
    groups = choices(conf, schema)
    if groups:
        lines += ["", "Groups (group=option):"] + [f"  {name}: {', '.join(files)}" for name, files in groups.items()]
    return "\n".join(lines)


def markdown(conf: Path) -> str:
    """The option reference of all verbs, as it stands in `conf/README.md`."""
    parts = [
        "# Options",
        "",
        "Written by `python -m fireflyds.option_reference`; a test keeps it in step with `fireflyds/config`.",
    ]
    for verb, record in config.VERBS.items():
        schema = record.config
        parts += ["", f"## `launch/{verb}.py`", "", "| key | default | meaning |", "|---|---|---|"]
        parts += [
            f"| `{key}` | `{default}` | {meaning} |".replace("| ``", "| `") for key, default, meaning in options(schema)
        ]
        for group, files in choices(conf, schema).items():
            parts += ["", f"`{group}=` " + ", ".join(f"`{name}`" for name in files)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    CONF = Path(__file__).parents[1] / "conf"
    (CONF / "README.md").write_text(markdown(CONF), encoding="utf-8")
