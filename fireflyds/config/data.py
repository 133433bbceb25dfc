"""Data options: sources, cleaning, preparation and mixture."""

import codecs
from dataclasses import dataclass, field

from omegaconf import MISSING

from fireflyds.config.enums import (
    Duplicates,
    LossOn,
    Preference,
    Role,
    StatsMode,
    TextSplit,
    UnicodeForm,
    require_at_least,
)
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """An item of `data.sources`: one source of raw text or dialogues."""

    path: str = MISSING
    """File, folder or glob (.txt .jsonl .json .csv .tsv .parquet .arrow, also .gz and .zst), a folder written by
    `datasets.save_to_disk`, or `hf:<dataset>[:<config>]`."""
    domain: str = "text"
    """Domain of the source: the name under which its tokens are counted, mixed and evaluated."""
    language: str = ""
    """Language of the text, used in the statistics."""
    format: str = "auto"
    """Record layout: an entry of `fireflyds/data/formats`, or `auto` (the detected one is printed)."""
    encoding: str = "utf-8"
    """Encoding of the files, such as `gb18030`, `big5` or `utf-16`. Rows in another one are rejected with a likely
    one."""
    split: TextSplit = TextSplit.line
    """Unit of one document in a .txt file: a `line`, a `paragraph` (separated by blank lines) or the `file`."""
    weight: float = 0.0
    """Share of the training tokens for the domain of the source (as in `data.weights`); 0: not set here."""
    max_documents: int = 0
    """Maximum number of documents, sampled evenly; 0: all."""

    def __post_init__(self) -> None:
        require_at_least(self, max_documents=0, weight=0)
        try:
            "".encode(self.encoding)  # also refuses codecs that are no text encodings, such as hex
            self.encoding = codecs.lookup(self.encoding).name
        except LookupError as error:
            raise UserError(
                "is not an encoding that Python knows",
                key="data.sources.encoding",
                value=self.encoding,
                remedy="Give one such as utf-8, gb18030, big5 or utf-16",
            ) from error


@dataclass(kw_only=True, slots=True)
class PhaseConfig:
    """An item of `data.curriculum`: the weights of the domains from a number of training tokens on."""

    tokens: int = MISSING
    """Number of training tokens after which these weights apply."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the training tokens by domain from then on."""

    def __post_init__(self) -> None:
        require_at_least(self, tokens=1)
        check_weights("data.curriculum.weights", self.weights)


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Section `data`: the token store, its sources and the mixture of its domains."""

    store: str = ""
    """Token store directory: `prepare` writes it (unless `out` is set), `train` reads it."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Raw data that `prepare` reads."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the training tokens by domain; empty: the weights of the sources, or in proportion to the tokens of
    each."""
    max_epochs: dict[str, float] = field(default_factory=dict)
    """Maximum number of passes over each domain; the share beyond it goes to the other domains."""
    curriculum: list[PhaseConfig] = field(default_factory=list)
    """Changes of the weights at given numbers of training tokens."""

    def __post_init__(self) -> None:
        check_weights("data.weights", self.weights)
        check_weights("data.max_epochs", self.max_epochs)
        starts = [phase.tokens for phase in self.curriculum]
        if starts != sorted(set(starts)):
            raise UserError(
                f"tokens {starts} must increase from phase to phase",
                key="data.curriculum",
                remedy="Give the phases in order, each tokens once",
            )

    @property
    def shares(self) -> dict[str, float]:
        """`weights`, with the weights of single sources for domains that it does not contain."""
        shares = dict(self.weights)
        for source in self.sources:
            if source.weight and source.domain not in self.weights:
                shares[source.domain] = shares.get(source.domain, 0.0) + source.weight
        return shares


def check_weights(name: str, weights: dict[str, float]) -> None:
    """Raises `UserError` for a weight that is not positive."""
    for domain, weight in weights.items():
        if weight <= 0:
            raise UserError(
                "must be greater than 0", key=f"{name}.{domain}", value=weight, remedy="Leave the domain out instead"
            )


@dataclass(kw_only=True, slots=True)
class CleanConfig:
    """Section `clean`: normalisation, filters and removal of duplicates."""

    unicode: UnicodeForm = UnicodeForm.none
    """Unicode normalisation: `nfc`, or `nfkc` (which also converts full-width letters and punctuation to
    half-width)."""
    width: bool = False
    """Convert full-width letters, digits and spaces to half-width; Chinese punctuation is unchanged."""
    simplify: bool = False
    """Convert traditional Chinese characters to simplified ones (OpenCC)."""
    boilerplate: bool = False
    """Drop navigation, copyright and advertising lines, and documents that contain nothing else."""
    max_repetition: float = 1.0
    """Drop documents with a larger fraction of repeated lines or repeated 10-character n-grams; 1: none."""
    min_characters: int = 0
    """Drop documents with fewer characters than this."""
    duplicates: Duplicates = Duplicates.keep
    """Drop documents that are `exact` duplicates of an earlier one, or `near` duplicates (MinHash over 5-character
    n-grams)."""
    similarity: float = 0.8
    """Jaccard similarity from which documents are near-duplicates."""
    decontaminate: list[str] = field(default_factory=list)
    """Evaluation sets (files, folders or globs): documents that share an n-gram of `overlap` characters with them are
    dropped."""
    overlap: int = 20
    """Length of the shared n-gram in characters, without white space and punctuation."""

    def __post_init__(self) -> None:
        require_at_least(self, min_characters=0, overlap=4)
        for name in ("max_repetition", "similarity"):
            if not 0 < getattr(self, name) <= 1:
                raise UserError(
                    "must be in (0, 1]",
                    key=f"clean.{name}",
                    value=getattr(self, name),
                    remedy="Give a share such as 0.8",
                )


@dataclass(kw_only=True, slots=True)
class PrepareConfig:
    """Keys of the verb `prepare`."""

    data: DataConfig = MISSING
    tokenizer: str = ""
    """Hugging Face directory, or a SentencePiece `.model`."""
    out: str = ""
    """Token store to write; empty: `data.store`."""
    template: str = "auto"
    """Chat template of dialogues: `tokenizer`, the own Jinja of the tokenizer's directory; an entry of
    `fireflyds/data/templates`; or `auto`: `tokenizer` where it has one, else `firefly`."""
    loss_on: LossOn = LossOn.answers
    """Tokens of a dialogue that contribute to the loss: all `answers`, the `last_answer`, or `all` tokens."""
    learn_roles: list[Role] = field(default_factory=lambda: [Role.assistant])
    """Roles whose turns contribute to the loss: a model that plays the user has `[user]`. With others than `assistant`
    a dialogue that is longer than a row goes on without its question repeated."""
    learn_reasoning: bool = True
    """Whether the thoughts before answers (`reasoning_content`, or up to `</think>`) contribute to the loss."""
    context_turns: int = 0
    """Turns that a dialogue longer than a row repeats, without loss, before the turn with which it goes on in the next
    row; its system message is always repeated."""
    preference: Preference = Preference.chosen
    """What is stored of preference pairs and labelled answers: the `chosen` ones as dialogues to imitate; or `pairs`,
    both answers of a pair in one document, and answers with their label, for objectives that compare them."""
    clean: CleanConfig = field(default_factory=CleanConfig)
    max_rejected: float = 0.01
    """Maximum fraction of unreadable rows; above it no store is written."""
    workers: int = 0
    """Number of tokenization processes; 0: one per core."""
    lost_after_seconds: float = 120.0
    """On several machines: the parts of a process that shows no sign of life for as long are given to another. Network
    file systems may show a sign a minute late."""
    inspect: int = 0
    """Print this many samples of each source with the tokens that contribute to the loss marked, and write nothing."""
    stats: StatsMode = StatsMode.full
    """`only`: print the statistics and document lengths of the existing store at `out`, and plot them in its
    `stats.png`."""

    def __post_init__(self) -> None:
        require_at_least(self, workers=0, inspect=0, lost_after_seconds=4, context_turns=0)
        if self.loss_on is LossOn.all and not self.learn_reasoning:
            raise UserError(
                "leaves out a part of the answers, but loss_on=all learns every token",
                key="learn_reasoning",
                value="false",
                remedy="Use loss_on=answers",
            )
        self._check_roles()
        if not 0 <= self.max_rejected <= 1:
            raise UserError(
                "must be in [0, 1]", key="max_rejected", value=self.max_rejected, remedy="Give a share such as 0.01"
            )

    def _check_roles(self) -> None:
        roles = [role.name for role in self.learn_roles]
        if not roles or len(set(roles)) < len(roles):
            raise UserError(
                "must name one role or more, each once", key="learn_roles", value=roles, remedy="Give [user]"
            )
        if roles == ["assistant"]:
            return
        if self.loss_on is not LossOn.answers or self.preference is Preference.pairs or not self.learn_reasoning:
            raise UserError(
                "needs loss_on=answers, preference=chosen and learn_reasoning=true",
                key="learn_roles",
                value=roles,
                remedy="Leave the other key out, or learn_roles",
            )
