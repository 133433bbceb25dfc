"""LLaMA-2 chat as Meta defines it: BOS before every turn, the system message inside the first `[INST]`."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(user=BOS + "[INST] {system}{} [/INST]", system="<<SYS>>\n{}\n<</SYS>>\n\n", answer=" {} ")
