"""Chinese-LLaMA-Alpaca-2: LLaMA-2's format with a bilingual default, and no space before `</s>`."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(
    user=BOS + "[INST] {system}{} [/INST]",
    system="<<SYS>>\n{}\n<</SYS>>\n\n",
    default_system="You are a helpful assistant. 你是一个乐于助人的助手。",
    answer=" {}",
)
