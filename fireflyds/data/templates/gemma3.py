"""Gemma 3: as Gemma, with the system message before the first question."""

from fireflyds.data.templates import gemma

CHAT = gemma.CHAT
