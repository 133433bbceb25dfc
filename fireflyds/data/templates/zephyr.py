"""Zephyr: role words on lines of their own, EOS after every turn."""

from fireflyds.data.templates import Chat
from fireflyds.types import EOS

CHAT = Chat(
    system="<|system|>\n{}" + EOS + "\n", user="<|user|>\n{}" + EOS + "\n", opening="<|assistant|>\n", after="\n"
)
