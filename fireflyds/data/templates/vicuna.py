"""Vicuna 1.1: `USER: … ASSISTANT: …</s>` after a system line (FastChat)."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(
    begin=BOS,
    system="{} ",
    default_system=(
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions."
    ),
    user="USER: {} ",
    opening="ASSISTANT:",
    answer=" {}",
)
