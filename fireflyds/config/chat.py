"""`chat`: a conversation in the terminal."""

from dataclasses import dataclass

from omegaconf import MISSING

from fireflyds.config.enums import require_at_least


@dataclass(kw_only=True, slots=True)
class ChatConfig:
    model: str = MISSING
    """Hugging Face directory with a chat template."""
    prompt: str = ""
    """Answer this one message and leave; empty: a conversation."""
    system: str = ""
    """System message."""
    max_new_tokens: int = 256
    """Longest answer."""
    temperature: float = 0.35
    """0 takes the likeliest token."""
    top_p: float = 0.9
    """Nucleus sampling."""
    seed: int = 42
    """Seed of sampling."""

    def __post_init__(self) -> None:
        require_at_least(self, max_new_tokens=1, temperature=0)
