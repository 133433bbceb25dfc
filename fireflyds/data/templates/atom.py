"""Atom (FlagAlpha): every turn between BOS and EOS."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS, EOS

CHAT = Chat(
    system=BOS + "System: {}\n" + EOS, user=BOS + "Human: {}\n" + EOS, opening=BOS + "Assistant: ", answer="{}\n"
)
