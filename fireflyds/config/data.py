"""Data: sources, how they are cleaned and prepared, and how their tokens are mixed."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from fireflyds.config.enums import Duplicates, LossOn, StatsMode, TextSplit, UnicodeForm, require_at_least
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    path: str = MISSING
    """File, folder or glob (.txt .jsonl .json .csv .tsv .parquet .arrow, also .gz and .zst), a folder that `datasets`
    saved, or `hf:<dataset>[:<config>]`."""
    domain: str = "text"
    """Name under which its tokens are counted, mixed and measured."""
    language: str = ""
    """Language of its text, for the counts."""
    format: str = "auto"
    """Record layout: an entry of `fireflyds/data/formats`, or `auto` (what is chosen is printed)."""
    split: TextSplit = TextSplit.line
    """What one document is in a .txt file: a `line`, a `paragraph` (blank line between) or the `file`."""
    weight: float = 0.0
    """Share of the training tokens that its domain gets (as `data.weights`); 0: no share is set here."""
    max_documents: int = 0
    """Most documents kept of it, drawn evenly; 0: all."""

    def __post_init__(self) -> None:
        require_at_least(self, max_documents=0, weight=0)


@dataclass(kw_only=True, slots=True)
class PhaseConfig:
    tokens: int = MISSING
    """Training tokens after which these weights hold."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the training tokens by domain from there on."""

    def __post_init__(self) -> None:
        require_at_least(self, tokens=1)
        check_weights("data.curriculum.weights", self.weights)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    store: str = ""
    """Token store directory: `prepare` writes it (unless `out` says otherwise), `train` reads it."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Raw files that `prepare` reads."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the training tokens by domain; empty: the sources' weights, or as much as there is of each."""
    max_epochs: dict[str, float] = field(default_factory=dict)
    """How often each domain may be seen; what it then no longer gets goes to the others."""
    curriculum: list[PhaseConfig] = field(default_factory=list)
    """Other weights from given token counts on."""

    def __post_init__(self) -> None:
        check_weights("data.weights", self.weights)
        check_weights("data.max_epochs", self.max_epochs)
        starts = [phase.tokens for phase in self.curriculum]
        if starts != sorted(set(starts)):
            raise UserError(f"data.curriculum: tokens {starts} must rise from phase to phase")

    @property
    def shares(self) -> dict[str, float]:
        """`weights`, with what single sources say of their domains."""
        shares = dict(self.weights)
        for source in self.sources:
            if source.weight and source.domain not in self.weights:
                shares[source.domain] = shares.get(source.domain, 0.0) + source.weight
        return shares


def check_weights(name: str, weights: dict[str, float]) -> None:
    """Raises `UserError` for a weight that is not positive."""
    for domain, weight in weights.items():
        if weight <= 0:
            raise UserError(f"{name}.{domain}={weight}: must be greater than 0. Leave the domain out instead")


@dataclass(kw_only=True, slots=True)
class CleanConfig:
    unicode: UnicodeForm = UnicodeForm.none
    """Unicode normalisation: `nfc`, or `nfkc` (which also turns full-width letters and punctuation into half-width)."""
    width: bool = False
    """Full-width letters, digits and spaces to half-width; Chinese punctuation stays."""
    simplify: bool = False
    """Traditional characters to simplified (OpenCC)."""
    boilerplate: bool = False
    """Drop lines of navigation, copyright and advertisement, and documents that are nothing else."""
    max_repetition: float = 1.0
    """Drop documents of which a larger share is repeated lines or repeated runs of ten characters; 1: none."""
    min_characters: int = 0
    """Drop documents shorter than this."""
    duplicates: Duplicates = Duplicates.keep
    """Drop documents that are `exact` copies of an earlier one, or `near` (MinHash over runs of five characters)."""
    similarity: float = 0.8
    """Jaccard similarity from which a document counts as a near-duplicate."""
    decontaminate: list[str] = field(default_factory=list)
    """Evaluation sets (files, folders or globs): documents that share a run of `overlap` characters are dropped."""
    overlap: int = 20
    """Characters in a row, white space and punctuation aside, that give a document away as contaminated."""

    def __post_init__(self) -> None:
        require_at_least(self, min_characters=0, overlap=4)
        for name in ("max_repetition", "similarity"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(f"clean.{name}={getattr(self, name)}: must be in (0, 1]. Give a share such as 0.8")


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    data: DataConfig = MISSING
    tokenizer: str = ""
    """Hugging Face directory, or a SentencePiece `.model`."""
    out: str = ""
    """Token store to write; empty: `data.store`."""
    template: str = "firefly"
    """Chat template of dialogues: an entry of `fireflyds/data/templates`."""
    loss_on: LossOn = LossOn.answers
    """What carries loss in a dialogue: all `answers`, the `last_answer`, or `all` of its text."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    max_rejected: float = 0.01
    """Largest share of rows that may be unreadable; above it no store is made."""
    workers: int = 0
    """Encoding processes; 0: one per core."""
    inspect: int = 0
    """Print this many samples of each source with their learned tokens marked, and write nothing."""
    stats: StatsMode = StatsMode.full
    """`only`: print the table and the lengths of the store that stands at `out`, and draw them in its `stats.png`."""

    def __post_init__(self) -> None:
        require_at_least(self, workers=0, inspect=0)
        if not 0 <= self.max_rejected <= 1:
            raise UserError(f"max_rejected={self.max_rejected}: must be in [0, 1]. Give a share such as 0.01")
