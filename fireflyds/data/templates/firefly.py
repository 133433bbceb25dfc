"""Firefly's chat format: `<s>u1</s>a1</s>u2</s>a2</s>`, no role words; a system message precedes the first turn."""

from fireflyds.data.templates import Chat
from fireflyds.types import BOS, EOS

CHAT = Chat(begin=BOS, user="{}" + EOS)
