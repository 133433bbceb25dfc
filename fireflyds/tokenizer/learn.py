"""Learns from text: pieces for a base tokenizer, or a complete tokenizer."""

import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds.config import PieceAlgorithm
from fireflyds.errors import UserError
from fireflyds.tokenizer.sample import lines
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.types import Encoder

CHARACTER_COVERAGE = 0.9995
# Code points that represent tokens in the trainer's input, one per token: ideographs, Hangul, private-use plane 15.
_LETTERS = [*range(0x4E00, 0xA000), *range(0xAC00, 0xD7A4), *range(0xF0000, 0xFFFFE)]
BYTE_LEVEL_SPECIAL = ("<|begin_of_text|>", "<|end_of_text|>")


def count_words(texts: Iterable[str], scripts: Scripts) -> Counter[str]:
    """Counts the words of the scripts, i.e. the runs of characters that no piece extends beyond.

    Raises:
        UserError: the texts have no word of the scripts.
    """
    words: Counter[str] = Counter()
    for text in texts:
        words.update(scripts.words(text))
    if not words:
        raise UserError(
            f"no {' or '.join(scripts.names)} text in it to learn pieces from",
            key="corpus",
            remedy="Give such text, or set scripts",
        )
    return words


def common_characters(words: Counter[str], scripts: Scripts, min_count: int) -> list[str]:
    """Returns the most common characters, up to CHARACTER_COVERAGE, with at least `min_count` occurrences."""
    counts: Counter[str] = Counter()
    for word, count in words.items():
        for character in word:
            counts[character] += count
    target_count = CHARACTER_COVERAGE * counts.total()
    chosen, covered = [], 0
    for character, count in counts.most_common():
        if covered >= target_count or count < min_count:
            break
        if scripts.covers(character):
            chosen.append(character)
        covered += count
    return chosen


def learn_pieces(
    words: Counter[str],
    encoder: Encoder,
    *,
    algorithm: PieceAlgorithm,
    num_pieces: int,
    max_piece_length: int,
) -> list[str]:
    """Returns the texts of about `num_pieces` pieces, best score first.

    `bpe` continues the base's merges: words are encoded with `encoder`, and each token is represented by one letter
    in the input of SentencePiece's trainer, so that every learned merge can be appended to the base's; pieces have
    at least two of the base's tokens. `unigram` learns from the characters of the words, as for the published
    Chinese-LLaMA vocabularies.
    """
    # The trainer counts the space before a word as a letter; `max_piece_length` excludes it.
    max_length = max_piece_length + any(word.startswith(" ") for word in words)
    if algorithm is PieceAlgorithm.unigram:
        model = _train(_weighted(words), num_pieces, "unigram", max_piece_length=max_length, input_format="tsv")
        return [piece for piece in pieces_by_score(model) if 1 < len(piece.strip()) <= max_piece_length]
    fragment_ids = encoder.fragments()
    letters: dict[int, str] = {}
    encoded: Counter[str] = Counter()
    for word, count in words.items():
        ids: list[int] = []
        for index in [*encoder.encode(word, continues=True), None]:
            if index is not None and index not in fragment_ids:
                ids.append(index)
                continue
            # Rare characters are encoded as bytes; no piece extends across them.
            if len(ids) > 1:
                encoded["".join(letters.setdefault(token_id, chr(_LETTERS[len(letters)])) for token_id in ids)] += count
            ids = []
    if not encoded:
        return []
    model = _train(
        _weighted(encoded),
        num_pieces + len(letters),
        "bpe",
        max_piece_length=max_length,
        input_format="tsv",
        split_by_unicode_script=False,
        split_by_number=False,
    )
    tokens = {letter: encoder.token(index) for index, letter in letters.items()}
    texts = ("".join(tokens[letter] for letter in piece) for piece in pieces_by_score(model) if len(piece) > 1)
    return [text for text in texts if len(text.strip()) <= max_piece_length]


def learn_bpe(texts: Iterable[str], *, vocab_size: int, max_piece_length: int) -> bytes:
    """Trains a SentencePiece BPE tokenizer in LLaMA-2's style: byte fallback, split digits, identity normalisation.

    Returns:
        The serialised model, of at most `vocab_size` pieces (fewer where the text has too few candidates).

    Raises:
        UserError: there is no text, or `vocab_size` is too small for its characters.
    """
    return _train(
        lines(texts),
        vocab_size,
        "bpe",
        max_piece_length=max_piece_length,
        byte_fallback=True,
        add_dummy_prefix=True,
        character_coverage=CHARACTER_COVERAGE,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        special=3,
    )


def learn_byte_level(texts: Iterable[str], *, vocab_size: int, max_piece_length: int) -> dict[str, Any]:
    """Trains a byte-level BPE tokenizer in the style of GPT-2; returns the contents of its `tokenizer.json`."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    bos, eos = BYTE_LEVEL_SPECIAL
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[bos, eos],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=max_piece_length,
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines(texts), trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    return dict(json.loads(tokenizer.to_str()))


def pieces_by_score(model: bytes) -> list[str]:
    """Returns the normal pieces of a serialised SentencePiece model, by descending score."""
    proto = sp_pb2.ModelProto()
    proto.ParseFromString(model)
    normal = [piece for piece in proto.pieces if piece.type == sp_pb2.ModelProto.SentencePiece.NORMAL]
    return [piece.piece.replace("▁", " ") for piece in sorted(normal, key=lambda piece: -piece.score)]


def _weighted(words: Counter[str]) -> Iterator[str]:
    return (f"{word}\t{count}" for word, count in words.items())


def _train(sentences: Iterator[str], vocab_size: int, model_type: str, **options: Any) -> bytes:
    first = next(sentences, None)
    if first is None:
        raise UserError("no text in it to learn from", key="corpus", remedy="Give files with text")
    requested_size = vocab_size
    # The trainer's vocabulary size includes <unk>, <s> and </s>.
    vocab_size += 3 - int(options.pop("special", 0))
    model = io.BytesIO()
    options = {"add_dummy_prefix": False, "character_coverage": 1.0} | options
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chain(first, sentences),
            model_writer=model,
            model_type=model_type,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            max_sentencepiece_length=options.pop("max_piece_length"),
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        match = re.search(r"smaller than required_chars\. (\d+) vs (\d+)", str(error))
        if match:
            raise UserError(
                f"{requested_size} pieces are too few: the characters of the text require at least {match.group(2)}",
                remedy="Raise vocab_size (learn) or num_pieces (expand)",
            ) from error
        raise UserError(
            f"learning pieces failed: {error}", key="corpus", remedy="Give other text, or another number of pieces"
        ) from error
    return model.getvalue()


def _chain(first: str, remaining: Iterator[str]) -> Iterator[str]:
    yield first
    yield from remaining
