"""Every data format keeps the contract of its folder."""

import pytest

from fireflyds import registry
from fireflyds.data.sources import detect
from fireflyds.types import Sample

FORMATS = "fireflyds.data.formats"


@pytest.mark.parametrize("name", registry.names(FORMATS))
def test_format_reads_its_own_example_and_is_detected_by_it(name: str) -> None:
    layout = registry.find(FORMATS, name)
    sample = layout.read(layout.EXAMPLE)
    assert isinstance(sample, Sample)
    assert bool(sample.text) != bool(sample.messages)
    assert layout.matches(layout.EXAMPLE)
    assert detect(layout.EXAMPLE) is layout


@pytest.mark.parametrize("name", registry.names(FORMATS))
def test_no_other_format_claims_the_example(name: str) -> None:
    example = registry.find(FORMATS, name).EXAMPLE
    assert [other for other in registry.names(FORMATS) if registry.find(FORMATS, other).matches(example)] == [name]


def test_alpaca_keeps_system_history_and_input() -> None:
    layout = registry.find(FORMATS, "alpaca")
    roles = [(message.role, message.content) for message in layout.read(layout.EXAMPLE).messages]
    assert roles == [
        ("system", "你是翻译。"),
        ("user", "你好"),
        ("assistant", "你好！"),
        ("user", "翻译成英文\n早上好"),
        ("assistant", "Good morning"),
    ]
