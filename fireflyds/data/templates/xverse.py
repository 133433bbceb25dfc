"""XVERSE: `Human:` and `Assistant:`, EOS (`<|endoftext|>`) after the answer."""

from fireflyds.data.templates import Chat

CHAT = Chat(system="{}\n\n", user="Human: {}\n\n", opening="Assistant: ")
