"""Options of learning and expanding vocabularies."""

from dataclasses import dataclass, field

from omegaconf import MISSING

from fireflyds.config.enums import (
    HeadInit,
    PieceAlgorithm,
    PreTokenizer,
    ReportMode,
    RowInit,
    TokenizerKind,
    VocabSizeRule,
    require_at_least,
)
from fireflyds.errors import UserError


@dataclass(kw_only=True, slots=True)
class LearnConfig:
    """Keys of the verb `learn`."""

    corpus: str = MISSING
    """Training text of the tokenizer: file, folder or glob."""
    out: str = MISSING
    """Tokenizer directory to write."""
    kind: TokenizerKind = TokenizerKind.sentencepiece
    """`sentencepiece` (BPE with byte fallback, as LLaMA-2) or `byte_level` (BPE over bytes, as GPT-2 and Llama-3)."""
    vocab_size: int = 32_000
    """Total number of pieces, including special and byte pieces."""
    max_piece_length: int = 16
    """Maximum length of a piece in characters (bytes, for `byte_level`)."""

    def __post_init__(self) -> None:
        require_at_least(self, vocab_size=300, max_piece_length=1)


@dataclass(kw_only=True, slots=True)
class ExpandConfig:
    """Keys of the verb `expand`."""

    base: str = MISSING
    """Hugging Face directory of the model or its tokenizer (`tokenizer.model` or `tokenizer.json`), or a `.model`."""
    out: str = ""
    """Directory to write."""
    pieces: str = ""
    """Pieces to merge: a `.model`, a byte-level `tokenizer.json`, or a text file with one piece a line."""
    corpus: str = ""
    """Text to learn pieces from, or to select given ones by: file, folder, glob, a folder written by
    `datasets.save_to_disk`, or `hf:<dataset>[:<config>]`."""
    sample_characters: int = 10_000_000
    """Maximum number of characters of `corpus` held in memory; a larger corpus is sampled evenly, by lines."""
    scripts: list[str] = field(default_factory=lambda: ["Han", "CJK_Punctuation"])
    """Scripts to add pieces for, by their Unicode names. Text without their characters keeps its token ids."""
    algorithm: PieceAlgorithm = PieceAlgorithm.bpe
    """Algorithm that learns pieces: `bpe` continues from the base's merges, `unigram` starts from the corpus alone."""
    num_pieces: int = 0
    """Maximum number of new rows to learn from `corpus`."""
    size: VocabSizeRule = VocabSizeRule.fixed
    """Number of new rows: `fixed`, limited by `num_pieces`; `knee`, at the knee of the curve of tokens saved; `alp`, at
    the knee of the curve of average log probability."""
    max_piece_length: int = 8
    """Maximum length of a learnt piece in characters."""
    min_count: int = 5
    """Minimum number of tokens that a learnt piece must save in the sample."""
    cure: bool = True
    """Drop pieces without a new character, and add the pieces without which a new one is unreachable; false: append the
    pieces as given, with tied scores, as in published Chinese-LLaMA vocabularies."""
    pretokenizer: PreTokenizer = PreTokenizer.base
    """Where text is cut before pieces are formed: as the `base` does, or with combining `marks` inside words (for Thai,
    Hindi, Burmese, Khmer, Tibetan, vowelled Arabic). Text without marks keeps its ids."""
    add_bytes: bool = False
    """Add the 256 byte pieces to a base that has none, so that it can encode every character."""
    vocab_multiple: int = 64
    """The vocabulary size is a multiple of this: learning stops at one, given pieces are filled up with single
    characters."""
    max_vocab_size: int = 0
    """Maximum size of the whole vocabulary; the pieces that save the fewest tokens are left out. 0: no limit."""
    init: RowInit = RowInit.mean
    """Initialization of new rows: `mean` of the old tokens of the piece's text, `weighted` (the same, with larger
    weights for rare old tokens), `random` (normal with the old rows' mean and covariance) or `omp` (sums of old rows
    that a `donor` model expresses the piece by; orthogonal matching pursuit)."""
    donor: str = ""
    """Model whose tokenizer has the new pieces, for `init=omp`: a Hugging Face directory, as of a Qwen for a LLaMA."""
    donor_terms: int = 64
    """Number of old rows in each sum of `init=omp`."""
    init_head: HeadInit = HeadInit.same
    """Initialization of the new rows of a head that is not tied: the `same` as the embeddings', the `mean` of the old
    rows of the piece's text, or the row of its `first_piece`, which the model would have written first."""
    seed: int = 42
    """Seed of `init=random` and of the sample."""
    texts: dict[str, str] = field(default_factory=dict)
    """Texts that the report is measured on: domain to file, folder or glob; empty: the part of `corpus` that is not
    used for learning."""
    report: ReportMode = ReportMode.full
    """`only`: compare `base` and `other` on `corpus` or `texts`, without an expansion."""
    other: str = ""
    """The second tokenizer of `report=only`."""

    def __post_init__(self) -> None:
        require_at_least(
            self,
            num_pieces=0,
            vocab_multiple=1,
            max_piece_length=1,
            max_vocab_size=0,
            min_count=1,
            sample_characters=1000,
            donor_terms=1,
        )
        if self.report is ReportMode.only:
            if not (self.other and (self.corpus or self.texts)):
                raise UserError(
                    "compares two tokenizers on text",
                    key="report",
                    value="only",
                    remedy="Give base=, other= and corpus= or texts.<domain>=",
                )
            return
        if self.other:
            raise UserError("is compared only with report=only", key="other", value=self.other, remedy="Leave it out")
        if not self.out:
            raise UserError("is not set; expand needs it", key="out", remedy="Give out=<directory>")
        if bool(self.pieces) == bool(self.num_pieces):
            raise UserError(
                f"either pieces or num_pieces is needed, got num_pieces={self.num_pieces}",
                key="pieces",
                value=f"{self.pieces!r}",
                remedy="Give either pieces=<.model or list> or num_pieces=<N> with corpus=<files>",
            )
        if self.num_pieces and not self.corpus:
            raise UserError(
                "needs text to learn from",
                key="num_pieces",
                value=self.num_pieces,
                remedy="Give corpus=<file, folder or glob>",
            )
        if not self.cure and not self.pieces:
            raise UserError(
                "appends given pieces as they are", key="cure", value="false", remedy="Give pieces=<.model or list>"
            )
        self._check_size_and_rows()

    def _check_size_and_rows(self) -> None:
        if self.size is not VocabSizeRule.fixed and not self.corpus:
            raise UserError(
                "is read from a curve on text",
                key="size",
                value=self.size.name,
                remedy="Give corpus=<file, folder or glob>",
            )
        if (self.init is RowInit.omp) != bool(self.donor):
            raise UserError(
                "init=omp and donor belong together",
                key="donor",
                value=repr(self.donor),
                remedy="Give init=omp and donor=<model that has the pieces>, or neither",
            )
        if self.init is RowInit.weighted and not self.corpus:
            raise UserError(
                "weighs by how often tokens occur in text",
                key="init",
                value="weighted",
                remedy="Give corpus=<file, folder or glob>",
            )
