"""Baichuan2: role tokens `<reserved_106>` and `<reserved_107>`."""

from fireflyds.data.templates import Chat

CHAT = Chat(
    system="{}", user="<reserved_106>{}", opening="<reserved_107>", special=("<reserved_106>", "<reserved_107>")
)
