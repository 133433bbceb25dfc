"""Every data format reads its own example, and is the only one that matches it."""

import pytest

from fireflyds import registry
from fireflyds.data.read.fields import is_decisive, unread_keys
from fireflyds.data.read.sources import detect_format
from fireflyds.types import Sample

FORMATS = "fireflyds.data.formats"


@pytest.mark.parametrize("name", registry.names(FORMATS))
def test_format_reads_its_own_example_and_is_detected_by_it(name: str) -> None:
    data_format = registry.load(FORMATS, name)
    sample = data_format.read(data_format.EXAMPLE)
    assert isinstance(sample, Sample)
    assert bool(sample.text) != bool(sample.messages)
    assert data_format.matches(data_format.EXAMPLE)
    assert detect_format(data_format.EXAMPLE) is data_format
    unread = unread_keys(data_format.EXAMPLE, data_format.reads(data_format.EXAMPLE))
    assert not [key for key in unread if is_decisive(key) and key not in getattr(data_format, "PASSES_OVER", ())]


@pytest.mark.parametrize("name", registry.names(FORMATS))
def test_no_other_format_matches_the_example(name: str) -> None:
    example = registry.load(FORMATS, name).EXAMPLE
    assert [other for other in registry.names(FORMATS) if registry.load(FORMATS, other).matches(example)] == [name]


def test_alpaca_keeps_system_history_and_input() -> None:
    data_format = registry.load(FORMATS, "alpaca")
    roles = [(message.role, message.content) for message in data_format.read(data_format.EXAMPLE).messages]
    assert roles == [
        ("system", "你是翻译。"),
        ("user", "你好"),
        ("assistant", "你好！"),
        ("user", "翻译成英文\n早上好"),
        ("assistant", "Good morning"),
    ]


def test_a_book_is_one_document_with_its_titles_in_order() -> None:
    book = {
        "title": "书",
        "content": [{"title": "卷一", "content": [{"chapter": "第一章", "paragraphs": ["甲。", "乙。"]}]}],
    }
    assert registry.load(FORMATS, "text").read(book).text == "书\n卷一\n第一章\n甲。\n乙。"


def test_the_chosen_answer_of_a_preference_pair_is_read() -> None:
    pair = {
        "conversations": [{"from": "human", "value": "问"}],
        "chosen": {"from": "gpt", "value": "好"},
        "rejected": {"from": "gpt", "value": "坏"},
    }
    assert [message.content for message in registry.load(FORMATS, "preference").read(pair).messages] == ["问", "好"]


@pytest.mark.parametrize(
    ("name", "record", "expected"),
    [
        (
            "flagalpha",
            {"text": "<s>Human: 一\n</s><s>Assistant: 二\n</s><s>Human: 三\n</s><s>Assistant: 四\n</s>"},
            "一二三四",
        ),
        (
            "sharegpt",
            {"system": "系", "conversations": [{"from": "human", "value": "一"}, {"from": "yayi", "value": "二"}]},
            "系一二",
        ),
        ("billa", {"instruction": "Human: 一\nAssistant: ", "input": "二", "output": "三"}, "一\n二三"),
        ("prompt_completion", {"input": "一", "target": "二"}, "一二"),
    ],
)
def test_dialogues_of_other_formats_keep_every_turn(name: str, record: dict, expected: str) -> None:
    assert "".join(message.content for message in registry.load(FORMATS, name).read(record).messages) == expected


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("flagalpha", {"text": "<s>Human: 一\n</s>rest"}),
        ("parallel", {"en": "a", "zh": " "}),
        ("prompt_completion", {"prompt": "", "completion": "x"}),
    ],
)
def test_malformed_rows_are_refused(name: str, record: dict) -> None:
    with pytest.raises(ValueError, match="empty|not a row"):
        registry.load(FORMATS, name).read(record)
