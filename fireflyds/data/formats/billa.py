"""BiLLa: `instruction`, `input` and `output` as in Alpaca, or a rendered `Human: …` in `instruction`, and `output`."""

from typing import Any

from fireflyds.types import Message, Sample

EXAMPLE = {"instruction": "Human: 你好\nAssistant: ", "input": "", "output": "你好！"}
_READS = frozenset({"instruction", "input", "output"})


def matches(record: dict[str, Any]) -> bool:
    """True where the record has the rendered prompt of this layout in `instruction`."""
    instruction = record.get("instruction")
    return isinstance(instruction, str) and instruction.startswith("Human: ") and "output" in record


def reads(record: dict[str, Any]) -> frozenset[str]:
    """The keys that `read` reads of this record."""
    return _READS


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record, one question and its answer.

    Raises:
        ValueError: the question or `output` is empty.
    """
    user = record["instruction"].removeprefix("Human: ").rstrip().removesuffix("Assistant:").rstrip()
    user = "\n".join(filter(None, [user, record.get("input")]))
    if not user or not record["output"]:
        raise ValueError("instruction and output must not be empty")
    return Sample(messages=(Message("user", user), Message("assistant", record["output"])))
