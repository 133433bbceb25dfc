"""`synthesize`: the demo's corpus."""

from dataclasses import dataclass

from omegaconf import MISSING


@dataclass(kw_only=True, slots=True)
class SynthesizeConfig:
    out: str = MISSING
    """Folder to write: documents, dialogues and questions."""
    corpus: str = ""
    """A person's own text (file, folder or glob) in place of the generated Chinese documents."""
    zh_bytes: int = 2_200_000
    """UTF-8 bytes of generated Chinese documents."""
    en_bytes: int = 1_100_000
    """UTF-8 bytes of generated English documents."""
    num_entities: int = 48
    """Invented things of each kind."""
    num_questions: int = 240
    """Multiple-choice questions held out from the dialogues."""
    heldout_documents: int = 150
    """Documents per language kept for bits per byte."""
    seed: int = 20240229
    """The same seed writes the same bytes."""
