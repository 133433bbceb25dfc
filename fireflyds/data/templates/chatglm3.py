"""ChatGLM3: role tokens, each followed by a line break and a space."""

from fireflyds.data.templates import Chat

CHAT = Chat(
    begin="[gMASK]sop",
    system="<|system|>\n {}",
    user="<|user|>\n {}",
    opening="<|assistant|>",
    answer="\n {}",
    special=("[gMASK]", "sop", "<|system|>", "<|user|>", "<|assistant|>"),
)
