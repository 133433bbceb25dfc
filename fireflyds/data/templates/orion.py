"""Orion: EOS stands between `Assistant:` and the answer too."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS, EOS

CHAT = Chat(begin=BOS, user="Human: {}\n\n", opening="Assistant: " + EOS)
