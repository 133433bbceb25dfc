"""Gemma: turns of user and model; the system message before the first question."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(
    begin=BOS,
    system="{}\n\n",
    user="<start_of_turn>user\n{system}{}<end_of_turn>\n",
    opening="<start_of_turn>model\n",
    stop="<end_of_turn>",
    after="\n",
    special=("<start_of_turn>", "<end_of_turn>"),
)
