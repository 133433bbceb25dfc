"""Options of `chat`: a conversation in the terminal."""

from dataclasses import dataclass

from omegaconf import MISSING

from fireflyds.config.enums import require_at_least


@dataclass(kw_only=True, slots=True)
class ChatConfig:
    """Keys of the verb `chat`."""

    model: str = MISSING
    """Hugging Face directory with a chat template."""
    prompt: str = ""
    """Answer this message and exit; empty: an interactive conversation."""
    system: str = ""
    """System message."""
    max_new_tokens: int = 256
    """Maximum length of an answer in tokens."""
    temperature: float = 0.35
    """Sampling temperature; 0: greedy decoding."""
    top_p: float = 0.9
    """Cumulative probability of nucleus sampling."""
    seed: int = 42
    """Random seed of sampling."""

    def __post_init__(self) -> None:
        require_at_least(self, max_new_tokens=1, temperature=0)
