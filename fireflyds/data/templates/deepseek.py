"""DeepSeek chat: `User:` and `Assistant:` after BOS."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(begin=BOS, system="{}\n\n", user="User: {}\n\n", opening="Assistant:", answer=" {}")
