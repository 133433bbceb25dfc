"""ChatGLM2: numbered rounds of 问 and 答."""

from fireflyds.data.templates import Chat

CHAT = Chat(
    begin="[gMASK]sop",
    system="{}\n\n",
    user="[Round {round}]\n\n问：{}\n\n",
    opening="答：",
    after="\n\n",
    special=("[gMASK]", "sop"),
)
