"""YaYi: role tokens, a default system message, and `<|End|>`."""

from fireflyds.data.templates import Chat

CHAT = Chat(
    begin="",
    system="<|System|>:\n{}\n\n",
    default_system=(
        "A chat between a human and an AI assistant named YaYi.\n"
        "YaYi is a helpful and harmless language model developed by Beijing Wenge Technology Co.,Ltd."
    ),
    user="<|Human|>:\n{}\n\n",
    opening="<|YaYi|>:\n",
    answer="{}\n\n",
    stop="<|End|>",
    special=("<|System|>", "<|Human|>", "<|YaYi|>", "<|End|>"),
)
