"""Mistral and Mixtral instruct: BOS once, the system message before the first question."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(begin=BOS, user="[INST] {system}{} [/INST]", system="{}\n\n")
