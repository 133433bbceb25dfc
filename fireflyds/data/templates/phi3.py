"""Phi-3: role tokens and `<|end|>`."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(
    begin=BOS,
    system="<|system|>\n{}<|end|>\n",
    user="<|user|>\n{}<|end|>\n",
    opening="<|assistant|>\n",
    stop="<|end|>",
    after="\n",
    special=("<|system|>", "<|user|>", "<|assistant|>", "<|end|>"),
)
