"""InternLM: `<|User|>:` and `<|Bot|>:`."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS

CHAT = Chat(begin=BOS, system="<|System|>:{}\n", user="<|User|>:{}\n", opening="<|Bot|>:", after="\n")
