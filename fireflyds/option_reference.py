"""The reference of options, read from the types, defaults and docstrings of the fields in `config/`."""

import ast
import dataclasses
import inspect
import re
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from fireflyds import config

_INTRO = """# Options

Written by `python -m fireflyds.option_reference`; a test keeps it in step with `fireflyds/config`.

A key is set on the command line, as `key=value`: \
`python launch/train.py run=cpt model=./base data=./store optim.steps=100`.
`-h` lists the keys of a verb, `--cfg job` prints the composed configuration. A group is a folder of option files:
`tuning=qlora` reads `conf/tuning/qlora.yaml`, which sets keys of the section `tuning`; an `experiment` sets keys of any
section. `conf/<verb>.yaml` selects the options that are not given. Keys on the command line take precedence.

A `required` key has no default: an option file or the command line sets it. \
`data.sources[].path` is a key of every item
of a list, as in `'data.sources=[{path: zh.jsonl, domain: zh}]'`."""


class Row(NamedTuple):
    """A key of the reference. `kind` is its type in words; alternatives are separated by ` | `."""

    key: str
    kind: str
    default: str
    meaning: str


class Entry(NamedTuple):
    """A verb, or a section with the verbs that take it."""

    heading: str
    schema: type
    rows: list[Row]
    verbs: list[str]


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


def sections(schema: type) -> dict[str, type]:
    """The fields of a dataclass that are dataclasses themselves."""
    types: dict[str, type] = get_type_hints(schema)
    return {name: kind for name, kind in types.items() if dataclasses.is_dataclass(kind)}


def rows(schema: type, prefix: str = "") -> Iterator[Row]:
    """Every key of a schema, with those of its sections and of the items of its lists."""
    docs, types, parts = field_docs(schema), get_type_hints(schema), sections(schema)
    for field in dataclasses.fields(schema):
        key, kind = prefix + field.name, types[field.name]
        if field.name in parts:
            yield from rows(kind, f"{key}.")
            continue
        value = field.default if field.default_factory is dataclasses.MISSING else field.default_factory()
        yield Row(key, _kind(kind), _default(value), docs[field.name])
        if get_origin(kind) is list and dataclasses.is_dataclass(get_args(kind)[0]):
            yield from rows(get_args(kind)[0], f"{key}[].")


def options(schema: type) -> Iterator[tuple[str, str, str]]:
    """Every key that can be set on the command line: dotted name, default, meaning."""
    yield from ((row.key, row.default, row.meaning) for row in rows(schema) if "[]" not in row.key)


def _kind(hint: Any) -> str:
    """A type as text: the members of an enum, the keys of a dataclass."""
    if isinstance(hint, type) and issubclass(hint, Enum):
        return " | ".join(hint.__members__)
    if dataclasses.is_dataclass(hint):
        return "{" + ", ".join(field.name for field in dataclasses.fields(hint)) + "}"
    parts = [_kind(part) for part in get_args(hint)]
    if form := {list: "list of {}", dict: "map {} → {}"}.get(get_origin(hint)):
        return form.format(*parts)
    return " | ".join(parts) or {Any: "any", NoneType: "null"}.get(hint) or str(hint.__name__)


def _default(value: Any) -> str:
    """A default as it is typed on the command line."""
    if isinstance(value, list):
        return "[" + ", ".join(_default(item) for item in value) + "]"
    text = value.name if isinstance(value, Enum) else str(value)
    return {MISSING: "required", "": '""', "None": "null", "True": "true", "False": "false"}.get(text, text)


def choices(conf: Path, schema: type) -> dict[str, list[str]]:
    """Option files by configuration group, for the groups that a schema has."""
    groups = [*sections(schema), *(["experiment"] if issubclass(schema, config.TrainConfig) else [])]
    return {group: files for group in groups if (files := sorted(p.stem for p in (conf / group).glob("*.yaml")))}


def help_text(verb: str, description: str, conf: Path) -> str:
    """What `-h` prints."""
    schema = config.VERBS[verb].config
    lines = [
        description.strip(),
        "",
        "Keys (key=value; `--cfg job` prints the composed configuration), with [type; default]:",
    ]
    width = max(len(row.key) for row in rows(schema))
    lines += [f"  {key:<{width}}  {meaning} [{kind}; {default}]" for key, kind, default, meaning in rows(schema)]
    groups = [f"  {name}: {', '.join(files)}" for name, files in choices(conf, schema).items()]
    return "\n".join(lines + (["", "Groups (group=option):", *groups] if groups else []))


def _verbs() -> dict[str, Entry]:
    """The verbs, with the keys that belong to no section."""
    entries = {}
    for verb, schema in ((verb, record.config) for verb, record in config.VERBS.items()):
        own = [row for row in rows(schema) if row.key.partition(".")[0] not in sections(schema)]
        entries[verb] = Entry(f"Verb `{verb}`", schema, own, [verb])
    return entries


def _sections() -> dict[tuple[str, type], Entry]:
    """The sections of all verbs, by name and dataclass. Sections of one name have the verbs in their headings."""
    pairs = [(section, verb) for verb, record in config.VERBS.items() for section in sections(record.config).items()]
    users = {section: [verb for other, verb in pairs if other == section] for section, _ in pairs}
    names, entries = [name for name, _ in users], {}
    for (name, schema), verbs in users.items():
        heading = f"Section `{name}`" + (f" of {_code(verbs)}" if names.count(name) > 1 else "")
        entries[name, schema] = Entry(heading, schema, list(rows(schema, f"{name}.")), verbs)
    return entries


def _code(words: list[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _link(heading: str, text: str) -> str:
    """A link to a heading, by the anchor that GitHub gives it."""
    return f"[{text}](#" + re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") + ")"


def _table(entry: Entry, owners: dict[Row, str]) -> list[str]:
    """The table of an entry; a row that stands under another heading is replaced by a link to it."""
    lines, elsewhere = [], dict[str, list[str]]()
    for row in entry.rows:
        if owners[row] == entry.heading:
            cells = row.key, row.kind.replace(" | ", "` \\| `"), row.default
            lines.append(f"| {' | '.join(f'`{cell}`' for cell in cells)} | " + row.meaning.replace("|", "\\|") + " |")
        else:
            elsewhere.setdefault(owners[row], []).append(row.key)
    links = [f"\nAs in {_link(heading, heading.lower())}: {_code(keys)}." for heading, keys in elsewhere.items()]
    return links + (["", "| key | type | default | meaning |", "|---|---|---|---|", *lines] if lines else [])


def _groups(verb: str, conf: Path) -> list[str]:
    """The groups of a verb with their option files, one a line."""
    lines, record = [], config.VERBS[verb]
    for group, files in choices(conf, record.config).items():
        path = record.path_options.get(group)
        short = f"; `{group}=<path>` stands for `{path.override.format('<path>')}`" if path else ""
        lines.append(f"- `{group}=` {_code(files)}{short}")
    return ["", "Groups:", "", *lines] if lines else []


def markdown(conf: Path) -> str:
    """The option reference of all verbs, as it stands in `conf/README.md`."""
    verbs, shared = _verbs(), _sections()
    # A row stands under the first of its headings, base classes before their subclasses.
    entries = sorted([*verbs.values(), *shared.values()], key=lambda entry: len(entry.schema.__mro__))
    owners = {row: entry.heading for entry in entries[::-1] for row in entry.rows}
    parts = [_INTRO, "", "## Verbs", "", "| verb | purpose |", "|---|---|"]
    for verb, entry in verbs.items():
        script = (conf.parent / "launch" / f"{verb}.py").read_text(encoding="utf-8")
        description = ast.get_docstring(ast.parse(script)) or ""
        parts.append(f"| {_link(entry.heading, f'`{verb}`')} | {description.splitlines()[0]} |")
    for verb, entry in verbs.items():
        taken = [_link(shared[section].heading, f"`{section[0]}`") for section in sections(entry.schema).items()]
        parts += ["", f"### {entry.heading}"] + (["", f"Sections: {', '.join(taken)}."] if taken else [])
        parts += _groups(verb, conf) + _table(entry, owners)
    parts += ["", "## Sections"]
    for entry in shared.values():
        users = ", ".join(_link(verbs[verb].heading, f"`{verb}`") for verb in entry.verbs)
        parts += ["", f"### {entry.heading}", "", f"Taken by {users}.", *_table(entry, owners)]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    CONF = Path(__file__).parents[1] / "conf"
    (CONF / "README.md").write_text(markdown(CONF), encoding="utf-8")
