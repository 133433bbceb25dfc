"""Hunyuan as Tencent defines it: `<|startoftext|>` before every question, and tokens behind the turns."""

from fireflyds.data.templates import Chat

CHAT = Chat(
    user="<|startoftext|>{system}{}<|extra_0|>",
    system="{}<|extra_4|>",
    stop="<|eos|>",
    special=("<|startoftext|>", "<|extra_0|>", "<|extra_4|>", "<|eos|>"),
)
