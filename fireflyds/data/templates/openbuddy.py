"""OpenBuddy's newer format: `<|role|>…<|says|>…<|end|>`."""

from fireflyds.data.templates import Chat

CHAT = Chat(
    system="<|role|>system<|says|>{}<|end|>\n",
    user="<|role|>user<|says|>{}<|end|>\n",
    opening="<|role|>assistant<|says|>",
    stop="<|end|>",
    after="\n",
    special=("<|role|>", "<|says|>", "<|end|>"),
)
