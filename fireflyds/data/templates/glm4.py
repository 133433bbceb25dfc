"""GLM-4 as Zhipu defines it: an answer ends with the token of the next turn, `<|user|>`, which the model writes."""

from fireflyds.data.templates import Chat

CHAT = Chat(
    begin="[gMASK]<sop>",
    system="<|system|>\n{}",
    user="<|user|>\n{}",
    opening="<|assistant|>",
    answer="\n{}",
    special=("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>"),
)
