"""Vicuna 1.1: `USER: … ASSISTANT: …</s>` after an optional system line (FastChat)."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(begin=BOS, system="{} ", user="USER: {} ", opening="ASSISTANT:", answer=" {}")
