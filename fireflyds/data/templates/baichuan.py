"""Baichuan: role tokens `<reserved_102>` and `<reserved_103>`."""

from fireflyds.data.templates import Chat

CHAT = Chat(
    system="{}", user="<reserved_102>{}", opening="<reserved_103>", special=("<reserved_102>", "<reserved_103>")
)
