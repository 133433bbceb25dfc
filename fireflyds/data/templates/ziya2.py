"""Ziya2: `<human>:` and `<bot>:` in one line."""

from fireflyds.data.templates import Chat

CHAT = Chat(user="<human>:{}", opening=" <bot>:")
