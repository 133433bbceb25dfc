"""Every verb is a file of `launch/`, an option file and a record; what the record names exists."""

from operator import attrgetter
from pathlib import Path
from typing import get_type_hints

import pytest

from fireflyds.app import CONF
from fireflyds.config import VERBS

LAUNCH = CONF.parent / "launch"


def test_records_files_and_options_are_the_same_verbs() -> None:
    assert {path.stem for path in LAUNCH.glob("*.py")} == set(VERBS)
    assert {path.stem for path in CONF.glob("*.yaml")} == set(VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_inputs_are_keys_of_the_verbs_config(verb: str) -> None:
    for key in VERBS[verb].inputs:
        schema = VERBS[verb].config
        for name in key.split("."):
            assert name in get_type_hints(schema), f"{verb}: {key}"
            schema = get_type_hints(schema)[name]


@pytest.mark.parametrize("verb", VERBS)
def test_path_options_are_option_files_and_keys(verb: str) -> None:
    for group, path_option in VERBS[verb].path_options.items():
        assert (CONF / group / f"{path_option.option}.yaml").is_file()
        key = path_option.override.partition("=")[0]
        assert key.startswith(f"{group}.")
        assert attrgetter(group)(VERBS[verb].config)


@pytest.mark.parametrize("verb", VERBS)
def test_a_verb_begins_with_a_docstring_that_gives_its_usage(verb: str) -> None:
    text = Path(LAUNCH / f"{verb}.py").read_text(encoding="utf-8")
    assert text.startswith(('"""', 'r"""'))
    assert f"python launch/{verb}.py" in text or f"launch/{verb}.py" in text
