"""MiniCPM: `<用户>` and `<AI>`."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(begin=BOS, user="<用户>{}", opening="<AI>")
