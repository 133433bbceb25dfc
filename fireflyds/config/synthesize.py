"""Options of `synthesize`: the demo corpus."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass(kw_only=True, slots=True)
class SynthesizeConfig:
    """Keys of the verb `synthesize`."""

    out: str = MISSING
    """Output folder of documents, dialogues and questions."""
    corpus: str = ""
    """User-provided text (file, folder or glob) instead of the generated Chinese documents."""
    zh_bytes: int = 2_200_000
    """UTF-8 bytes of generated Chinese documents."""
    en_bytes: int = 1_100_000
    """UTF-8 bytes of generated English documents."""
    num_entities: int = 48
    """Number of invented entities of each kind."""
    num_questions: int = 240
    """Number of multiple-choice questions held out from the dialogues."""
    heldout_documents: int = 150
    """Number of documents per language held out for bits per byte."""
    seed: int = 20240229
    """Random seed; the same seed writes identical files."""
