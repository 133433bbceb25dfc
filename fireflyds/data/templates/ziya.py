"""Ziya: `<human>:` and `<bot>:` on lines of their own, no BOS."""

from fireflyds.data.templates import Chat

CHAT = Chat(user="<human>:{}\n", opening="<bot>:")
