"""Llama-3 as Meta defines it."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(
    begin=BOS,
    system="<|start_header_id|>system<|end_header_id|>\n\n{}<|eot_id|>",
    user="<|start_header_id|>user<|end_header_id|>\n\n{}<|eot_id|>",
    opening="<|start_header_id|>assistant<|end_header_id|>\n\n",
    stop="<|eot_id|>",
    special=("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
)
