"""Linly: instruction and response in one line."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(begin=BOS, user="### Instruction:{}  ", opening="### Response:")
