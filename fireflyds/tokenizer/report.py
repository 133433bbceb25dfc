"""How well tokenizers fit a text."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass

from fireflyds.types import Encoder


@dataclass(frozen=True, slots=True)
class Fit:
    """Sizes of one text under one tokenizer."""

    documents: int
    characters: int
    num_bytes: int
    tokens: int

    @property
    def tokens_per_character(self) -> float:
        return self.tokens / max(self.characters, 1)

    def as_dict(self) -> dict[str, float]:
        return asdict(self) | {"tokens_per_character": self.tokens_per_character}


def measure(encoder: Encoder, texts: Iterable[str]) -> Fit:
    """Tokens of plain text, without BOS and EOS."""
    documents = characters = num_bytes = tokens = 0
    for text in texts:
        documents += 1
        characters += len(text)
        num_bytes += len(text.encode())
        tokens += len(encoder.encode(text))
    return Fit(documents, characters, num_bytes, tokens)
