"""InternLM2: ChatML after BOS."""

import dataclasses

from fireflyds.data.templates import chatml
from fireflyds.types import BOS

CHAT = dataclasses.replace(chatml.CHAT, begin=BOS)
