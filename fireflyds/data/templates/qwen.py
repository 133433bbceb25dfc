"""Qwen 1 to 2.5: ChatML with a default system message."""

import dataclasses

from fireflyds.data.templates import chatml

CHAT = dataclasses.replace(chatml.CHAT, default_system="You are a helpful assistant.")
