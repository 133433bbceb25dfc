"""BELLE: role words on lines of their own."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(begin=BOS, user="Human: \n{} \n\n", opening="Assistant: \n")
