"""ChatML (OpenAI; Yi, and Qwen without its default system message)."""

from fireflyds.data.templates import Chat

CHAT = Chat(
    system="<|im_start|>system\n{}<|im_end|>\n",
    user="<|im_start|>user\n{}<|im_end|>\n",
    opening="<|im_start|>assistant\n",
    stop="<|im_end|>",
    after="\n",
    special=("<|im_start|>", "<|im_end|>"),
)
