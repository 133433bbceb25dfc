r"""FlagAlpha (Llama-Chinese, Atom): a dialogue rendered into `text`, `<s>Human: …\n</s><s>Assistant: …\n</s>`."""

import re
from typing import Any

from fireflyds.types import Message, Sample

EXAMPLE = {"text": "<s>Human: 你好\n</s><s>Assistant: 你好！\n</s>"}

_READS = frozenset({"text"})

_TURN = re.compile(r"<s>(System|Human|Assistant): ?(.*?)\n?</s>", re.DOTALL)
_ROLES = {"System": "system", "Human": "user", "Assistant": "assistant"}


def matches(record: dict[str, Any]) -> bool:
    """True where the record has a dialogue of this layout in `text`."""
    text = record.get("text")
    return isinstance(text, str) and text.startswith(("<s>Human:", "<s>System:"))


def reads(record: dict[str, Any]) -> frozenset[str]:
    """The keys that `read` reads of this record."""
    return _READS


def read(record: dict[str, Any]) -> Sample:
    """Returns the dialogue of the record.

    Raises:
        ValueError: `text` has content outside of the turns.
    """
    text = record["text"].strip()
    turns = _TURN.findall(text)
    if not turns or _TURN.sub("", text).strip():
        raise ValueError("text is not a row of <s>Human: …</s><s>Assistant: …</s> turns")
    return Sample(messages=tuple(Message(_ROLES[role], content) for role, content in turns))
