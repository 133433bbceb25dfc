"""BiLLa: the space after `Assistant:` belongs to the prompt."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(begin=BOS, user="Human: {}\n", opening="Assistant: ")
