"""Every evaluation task has a config section of its name, names its protocol, and lists its inputs for the verb."""

import dataclasses

import pytest

from fireflyds import app, registry
from fireflyds.cluster.input_checks import require_input_paths
from fireflyds.config import VERBS, EvaluateConfig
from fireflyds.errors import UserError
from fireflyds.evaluation.tasks import PACKAGE, load_task, task_options

TASKS = registry.names(PACKAGE)
SECTIONS = {
    field.name: field.type for field in dataclasses.fields(EvaluateConfig) if dataclasses.is_dataclass(field.type)
}
# `<task>.<field>` that name files or folders.
INPUTS = [key.split(".") for key in VERBS["evaluate"].inputs if "." in key]


@pytest.mark.parametrize("name", TASKS)
def test_a_task_has_a_section_and_names_its_protocol_and_source(name: str) -> None:
    task = load_task(name)
    options = task_options(name, app.compose("evaluate", ["model=x/y", f"tasks=[{name}]"]))
    assert isinstance(options, SECTIONS[name])
    assert task.protocol
    assert task.source
    assert task.covers_all(options)


def test_every_section_belongs_to_a_task() -> None:
    assert SECTIONS.keys() == set(TASKS)


def test_every_task_has_inputs_and_they_are_fields_of_its_section() -> None:
    assert {name for name, _ in INPUTS} == set(TASKS)
    for name, field in INPUTS:
        assert field in {section_field.name for section_field in dataclasses.fields(SECTIONS[name])}


def test_protocols_are_distinct() -> None:
    assert len({load_task(name).protocol for name in TASKS}) == len(TASKS)


@pytest.mark.parametrize(("name", "field"), INPUTS)
def test_inputs_of_a_task_are_checked_before_its_job_is_submitted(name: str, field: str, tmp_path) -> None:
    key = f"{name}.{field}.zh" if field == "texts" else f"{name}.{field}"
    config = app.compose("evaluate", [f"model={tmp_path}", f"tasks=[{name}]", f"{key}=nowhere/at/all"])
    with pytest.raises(UserError, match=rf"{name}\.{field}=nowhere/at/all: is not there"):
        require_input_paths("evaluate", config)


@pytest.mark.parametrize(("name", "field"), INPUTS)
def test_a_task_without_its_inputs_is_refused_with_their_key(name: str, field: str) -> None:
    with pytest.raises(UserError, match=rf"{name}\.{field}"):
        load_task(name).evaluate(None, SECTIONS[name](), None)  # type: ignore[arg-type]
