"""Rows of data as people publish them: every turn is read with its role and loss, or the row is rejected by name."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from fireflyds import registry
from fireflyds.config import SourceConfig
from fireflyds.data.read.records import RejectedRow
from fireflyds.data.read.sources import FORMATS, LocatedSample, read_part, source_parts

Q, A = {"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}


def read_rows(tmp_path: Path, *rows: Any, name: str = "rows.jsonl") -> list[LocatedSample | RejectedRow]:
    file = tmp_path / name
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = SourceConfig(path=str(file))
    return [item for part in source_parts(source) for item in read_part(source, part)]


def dialogue(item: LocatedSample | RejectedRow) -> list[tuple[str, str, bool]]:
    assert isinstance(item, LocatedSample), item
    return [(message.role, message.content, message.learn) for message in item.sample.messages]


def turns(*texts: str, system: str = "") -> list[tuple[str, str, bool]]:
    roles = ("user", "assistant")
    head = [("system", system, True)] if system else []
    return [*head, *((roles[number % 2], text, True) for number, text in enumerate(texts))]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "三", "response": "四", "history": [["一", "二"]]}, turns("一", "二", "三", "四")),
        (
            {"query": "三", "response": "四", "history": [["一", "二"]], "system": "系"},
            turns("一", "二", "三", "四", system="系"),
        ),
        ({"prompt": "三", "response": "四", "history": json.dumps([["一", "二"]])}, turns("一", "二", "三", "四")),
        ({"prompt": "三", "response": "四", "history": [Q, A]}, turns("问", "答", "三", "四")),
        ({"prompt": "三", "response": "四", "history": []}, turns("三", "四")),
        ({"instruction": "三", "output": "四", "history": [Q, A]}, turns("问", "答", "三", "四")),
        ({"instruction": "一", "context": "二", "response": "三", "category": "qa"}, turns("一\n二", "三")),
        ({"prompt": [Q], "completion": [A]}, turns("问", "答")),
        ({"system": "系", "messages": [Q, A]}, turns("问", "答", system="系")),
        (
            {"system": "系", "messages": [{"role": "system", "content": "系"}, Q, A]},
            turns("问", "答", system="系"),
        ),
        ({"messages": json.dumps([Q, A])}, turns("问", "答")),
        ({"messages": [{"role": "developer", "content": "系"}, Q, A]}, turns("问", "答", system="系")),
        ({"messages": [Q, {"role": "model", "content": "答"}]}, turns("问", "答")),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "问"}, "题"]}, A]}, turns("问题", "答")),
        ({"conversations": [Q, A]}, turns("问", "答")),
        (
            {"conversations": [{"from": "Human", "value": "问"}, {"from": "Assistant", "value": "答"}]},
            turns("问", "答"),
        ),
        ({"conversations": [{"from": "user", "value": "问"}, {"from": "chatgpt", "value": "答"}]}, turns("问", "答")),
        ({"conversation": [{"input": "问", "output": "答", "system": "系"}]}, turns("问", "答", system="系")),
        ({"prompt": "问", "chosen": "答", "rejected": "错"}, turns("问", "答")),
        ({"prompt": [Q], "chosen": [A], "rejected": [A]}, turns("问", "答")),
        ({"chosen": [Q, A], "rejected": [Q, A]}, turns("问", "答")),
        ({"prompt": "问", "messages": [Q, A], "chosen": [Q, A], "rejected": [Q, A]}, turns("问", "答")),
        ({"prompt": "问", "chosen": [Q, A], "rejected": [Q, A]}, turns("问", "答")),
        ({"prompt": [Q], "chosen": [Q, A], "rejected": [Q, A]}, turns("问", "答")),
        ({"question": "问", "prompt": "问", "chosen": "答", "rejected": "错"}, turns("问", "答")),
        ({"prompt": "问", "completion": "答", "label": True}, turns("问", "答")),
        ({"instruction": "问", "input": "", "output": "答", "history": ""}, turns("问", "答")),
        ({"instruction": "", "output": "", "messages": [Q, A], "conversations": []}, turns("问", "答")),
        ({"Instruction": "一", "Context": "二", "Response": "三"}, turns("一\n二", "三")),
        ({"问题": "问", "答案": "答"}, turns("问", "答")),
        ({"指令": "一", "输入": "二", "输出": "三"}, turns("一\n二", "三")),
        ({"Question": "问", "Answer": "答"}, turns("问", "答")),
    ],
)
def test_every_turn_of_a_dialogue_is_read(tmp_path: Path, row: dict, expected: list) -> None:
    (item,) = read_rows(tmp_path, row)
    assert dialogue(item) == expected


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [Q, A | {"weight": 0}, Q, A | {"weight": 1}]},
        {"messages": [Q, A | {"train": False}, Q, A]},
        {"messages": [Q, A, Q, A], "loss_mask": [0, 0, 0, 1]},
        {"conversations": [Q, A | {"loss": False}, Q, A | {"loss": True}]},
        {"messages": json.dumps([Q, A | {"weight": 0.0}, Q, A])},
    ],
)
def test_an_answer_of_weight_zero_stays_without_loss(tmp_path: Path, row: dict) -> None:
    (item,) = read_rows(tmp_path, row)
    assert [learn for role, _, learn in dialogue(item) if role == "assistant"] == [False, True]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [Q, A], "tools": [{"type": "x"}]}, "tools has an item without the name of a function"),
        ({"messages": [Q, A], "functions": [{"name": "w"}]}, "the layout messages does not read functions"),
        ({"messages": [Q, A | {"tool_calls": [{"id": 1}]}]}, "has a tool call without the name of a function"),
        (
            {"messages": [Q | {"reasoning_content": "想"}, A]},
            "turn 1 (user) has reasoning, which only the",
        ),
        ({"prompt": "问", "response": "答", "tools": [{"name": "w"}]}, "prompt_completion does not read tools"),
        ({"prompt": "问", "response": "答", "images": ["a.png"]}, "prompt_completion does not read images"),
        ({"question": "问", "answer": "答", "context": "文"}, "prompt_completion does not read context"),
        ({"messages": [Q, A], "history": [["一", "二"]]}, "messages does not read history"),
        ({"conversation": [{"human": "问", "assistant": "答", "input": "文"}]}, "does not read conversation[].input"),
        ({"Messages": [Q, A], "Functions": [{"name": "w"}]}, "messages does not read functions"),
        ({"system": "甲", "系统": "乙", "messages": [Q, A]}, "messages does not read 系统"),
        ({"prompt": [Q], "completion": [A], "history": [["一", "二"]]}, "does not read history"),
        ({"instruction": "偶数吗？", "input": 0, "output": "是"}, "expected str instance, int found"),
        ({"messages": "[" * 100_000}, "messages is a string, but not JSON"),
        ({"prompt": "别的", "chosen": [Q, A], "rejected": [Q, A]}, "a dialogue without the text of prompt"),
        ({"messages": [A], "chosen": [Q, A], "rejected": [Q, A]}, "does not begin with the turns of messages"),
        ({"title": "题", "paragraphs": ["a", ["b"]]}, "paragraphs holds a list, not text"),
        ({"instruction": "a", "output": "b", "history": ["\ud800"]}, 'item 1 is "\\ud800", not a pair'),
        ({"messages": [Q, A], "label": "good"}, "messages does not read label"),
        ({"messages": [Q, A | {"weight": 0}]}, "no turn of the assistant carries loss"),
        ({"messages": [Q, A | {"weight": 0.5}]}, "turn 2: weight 0.5 is neither 0 nor 1"),
        ({"messages": [Q, A], "loss_mask": [1]}, "loss_mask has 1 values for 2 turns"),
        ({"messages": [Q, {"role": "critic", "content": "x"}]}, "turn 2: role 'critic' is not known. Known: system,"),
        ({"messages": [Q, {"content": "x"}]}, "turn 2 has neither role nor from; its keys: content"),
        ({"messages": [Q, {"role": "assistant"}]}, "turn 2 (assistant) has no text; its keys: role"),
        ({"messages": [Q, "答"]}, "turn 2 is a str, not an object with role and content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, A]},
            "turn 1 (user) has a part of type 'image_url'",
        ),
        ({"messages": "[{broken"}, "messages is a string, but not JSON"),
        ({"system": "甲", "messages": [{"role": "system", "content": "乙"}, Q, A]}, "with different texts"),
        (
            {"prompt": "问", "response": "答", "history": [["一", "二", "三"]]},
            'item 1 is ["一", "二", "三"], not a pair',
        ),
        ({"prompt": "问", "response": "答", "history": ["一", "二"]}, 'item 1 is "一", not a pair of strings'),
        ({"conversation": [{"human": "问"}]}, "pair 1 of conversation has not the keys human and assistant"),
    ],
)
def test_a_row_that_cannot_be_read_whole_is_rejected_by_name(tmp_path: Path, row: dict, reason: str) -> None:
    (item,) = read_rows(tmp_path, row)
    assert isinstance(item, RejectedRow)
    assert reason in item.reason


def test_unread_keys_are_listed_and_empty_ones_are_not(tmp_path: Path) -> None:
    row = {"messages": [Q | {"name": "a"}, A | {"id": 3}], "source": "web", "tools": [], "url": None, "images": []}
    (item,) = read_rows(tmp_path, row)
    assert isinstance(item, LocatedSample)
    assert item.unread == ["source", "messages[].id", "messages[].name"]
    (document,) = read_rows(tmp_path, {"title": "题", "text": "文", "content": "另文", "label": 1})
    assert isinstance(document, LocatedSample)
    assert (document.sample.text, document.unread) == ("文", ["title", "content", "label"])


UNION = [
    {"instruction": "你好", "output": "你好！"},
    {"conversations": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}]},
    {"messages": [Q, A]},
    {"text": "一篇文档。"},
    {"content": "另一篇文档。"},
]


def test_null_fields_of_a_table_choose_no_layout(tmp_path: Path) -> None:
    keys = list(dict.fromkeys(key for row in UNION for key in row))
    rows = [{key: row.get(key) for key in keys} for row in UNION]
    layouts = ["alpaca", "sharegpt", "messages", "text", "text"]
    assert [item.layout for item in read_rows(tmp_path, *rows) if isinstance(item, LocatedSample)] == layouts
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    source = SourceConfig(path=str(tmp_path / "rows.parquet"))
    items = [item for part in source_parts(source) for item in read_part(source, part)]
    assert [item.layout for item in items if isinstance(item, LocatedSample)] == layouts


def test_a_row_is_read_alike_after_any_other(tmp_path: Path) -> None:
    examples = [registry.load(FORMATS, name).EXAMPLE for name in registry.names(FORMATS)] + UNION
    alone = [read_rows(tmp_path, row)[0] for row in examples]
    for shift in range(len(examples)):
        items = read_rows(tmp_path, *examples[shift:], *examples[:shift])
        expected = alone[shift:] + alone[:shift]
        assert [(item.sample, item.layout) for item in items if isinstance(item, LocatedSample)] == [
            (item.sample, item.layout) for item in expected if isinstance(item, LocatedSample)
        ]
        assert len(items) == len(examples)


def test_a_table_of_one_script_is_no_parallel_text(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("用户提问,客服应答\n有货吗？,有。\nIs it in stock?,有货。\n", encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / "a.csv"))
    items = [item for part in source_parts(source) for item in read_part(source, part)]
    assert [isinstance(item, RejectedRow) for item in items] == [True, True, False]
    assert isinstance(items[0], RejectedRow)
    assert "both columns are of one script, so it is no parallel text: 用户提问, 客服应答" in items[0].reason


def test_rows_below_data_are_rows(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"version": "1", "data": [{"messages": [Q, A]}] * 3}), encoding="utf-8")
    source = SourceConfig(path=str(tmp_path / "a.json"))
    items = [item for part in source_parts(source) for item in read_part(source, part)]
    assert [dialogue(item) for item in items] == [turns("问", "答")] * 3


def test_text_in_a_chat_template_is_marked(tmp_path: Path) -> None:
    text = "<|im_start|>user\n问<|im_end|>\n<|im_start|>assistant\n答<|im_end|>"
    items = read_rows(tmp_path, {"text": text}, {"text": "plain"}, {"prompt": "[INST] 问 [/INST]", "response": "答"})
    assert [item.marker for item in items if isinstance(item, LocatedSample)] == ["<|im_start|>", "", "[INST]"]


def test_unpaired_surrogates_in_names_of_keys_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "ok", "\\ud83dx": "b"}\n')
    source = SourceConfig(path=str(tmp_path / "a.jsonl"))
    (item,) = [item for part in source_parts(source) for item in read_part(source, part)]
    assert isinstance(item, LocatedSample)
    assert item.unread == ["\\ud83dx"]


def test_lists_of_rows_beside_data_are_not_lost(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps({"data": [{"text": "x"}], "train": [{"text": "y"}]}))
    source = SourceConfig(path=str(tmp_path / "a.json"))
    (item,) = [item for part in source_parts(source) for item in read_part(source, part)]
    assert isinstance(item, RejectedRow)
    assert (item.line, "train hold rows too" in item.reason) == (0, True)


def test_lines_of_a_book_are_read_in_order(tmp_path: Path) -> None:
    (item,) = read_rows(tmp_path, {"title": "题", "content": ["一", "二"]})
    assert isinstance(item, LocatedSample)
    assert item.sample.text == "题\n一\n二"


def test_a_row_of_text_alone_is_read_as_one_with_a_null_field(tmp_path: Path) -> None:
    texts = [
        "  诗\t",
        " ",
        "",
        "a\ud800b",
        "<s>Human: 问\n</s><s>Assistant: 答\n</s>",
        "<s>Human: 问",
        "<|im_start|>user",
        3,
    ]
    for text in texts:
        alone, beside = read_rows(tmp_path, {"text": text}, {"text": text, "title": None})
        assert dataclasses.replace(alone, line=2) == beside
