"""Orion: an EOS also between `Assistant:` and the answer."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS, EOS

CHAT = Chat(begin=BOS, user="Human: {}\n\n", opening="Assistant: " + EOS)
