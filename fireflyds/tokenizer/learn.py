"""Learn SentencePiece BPE pieces from text."""

import io
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds.errors import UserError

NORMAL = sp_pb2.ModelProto.SentencePiece.NORMAL

# Han (with extensions and compatibility forms), and CJK and full-width punctuation. Quotation marks and dashes that
# English uses too (“ ” — …) are not among them: text without the new scripts must keep its ids.
HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
CJK_PUNCTUATION = "\u3001-\u3006\u3008-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
_HAN_OR_PUNCTUATION = re.compile(f"[{HAN}]+|[{CJK_PUNCTUATION}]")
# A line without a break is cut here: the trainer is quadratic in the length of what it cannot split.
_LONGEST_LINE = 1000
CHARACTER_COVERAGE = 0.9995


def has_han(text: str) -> bool:
    return re.search(f"[{HAN}]", text) is not None


def has_new_script(text: str) -> bool:
    """Han or CJK punctuation: what an expansion to Chinese adds pieces for."""
    return _HAN_OR_PUNCTUATION.search(text) is not None


def learn_bpe(texts: Iterable[str], *, vocab_size: int, max_piece_length: int) -> bytes:
    """A SentencePiece BPE tokenizer in the LLaMA-2 style: byte fallback, split digits, identity normalisation.

    Returns the serialised model, of at most `vocab_size` pieces (fewer when the text has no more).

    Raises:
        UserError: there is no text, or `vocab_size` is too small for its characters.
    """
    return _train(
        _lines(texts),
        vocab_size,
        max_piece_length=max_piece_length,
        byte_fallback=True,
        add_dummy_prefix=True,
        character_coverage=CHARACTER_COVERAGE,
    )


def learn_chinese_pieces(
    read_texts: Callable[[], Iterable[str]], *, num_pieces: int, max_piece_length: int
) -> list[str]:
    """Pieces of Han characters, most useful first; single characters and CJK punctuation are among them.

    No piece crosses punctuation, a space or another script. Returns at most `num_pieces`, of which at most half
    are single characters: rarer ones stay with the base's byte fallback. `read_texts` is called twice, once to
    count characters and once to learn.

    Raises:
        UserError: the text has no Han characters.
    """
    counts: Counter[str] = Counter()
    for run in _runs(read_texts(), _HAN_OR_PUNCTUATION):
        counts.update(run)
    wanted = "".join(re.escape(character) for character in _common(counts, num_pieces // 2))
    if not wanted:
        raise UserError("corpus: no Han text in it to learn pieces from. Give Chinese text")
    # Stretches of common characters; a punctuation mark stands alone, so that no piece crosses it.
    common_runs = re.compile(f"(?:(?![{CJK_PUNCTUATION}])[{wanted}])+|[{wanted}]")
    model = _train(
        _runs(read_texts(), common_runs),
        # Three more for the trainer's own <unk>, <s> and </s>.
        num_pieces + 3,
        max_piece_length=max_piece_length,
        byte_fallback=False,
        add_dummy_prefix=False,
        character_coverage=1.0,
    )
    # The trainer adds the bare space mark, which is not Chinese.
    return [piece for piece in normal_pieces(model) if has_new_script(piece)]


def _runs(texts: Iterable[str], pattern: re.Pattern[str]) -> Iterator[str]:
    return (run for text in texts for run in pattern.findall(text))


def _common(counts: Counter[str], most: int) -> list[str]:
    """The commonest characters, up to `most`, that make up CHARACTER_COVERAGE of the text."""
    enough = CHARACTER_COVERAGE * counts.total()
    chosen, covered = [], 0
    for character, count in counts.most_common(max(1, most)):
        if covered >= enough:
            break
        chosen.append(character)
        covered += count
    return chosen


def normal_pieces(model: bytes) -> list[str]:
    """The pieces of a serialised model, in order, without special and byte pieces."""
    proto = sp_pb2.ModelProto()
    proto.ParseFromString(model)
    return [piece.piece for piece in proto.pieces if piece.type == NORMAL]


def _train(sentences: Iterator[str], vocab_size: int, **options: Any) -> bytes:
    first = next(sentences, None)
    if first is None:
        raise UserError("corpus: no text of the wanted script to learn from. Give files with such text")
    max_piece_length = options.pop("max_piece_length")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_chain(first, sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentencepiece_length=max_piece_length,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        needed = re.search(r"smaller than required_chars\. (\d+) vs (\d+)", str(error))
        if needed:
            raise UserError(
                f"{vocab_size} pieces are too few: the text's characters alone need {needed.group(2)}. "
                "Raise vocab_size (learn) or num_pieces (expand)"
            ) from error
        raise UserError(f"learning pieces from the corpus failed: {error}") from error
    return model.getvalue()


def _chain(first: str, rest: Iterator[str]) -> Iterator[str]:
    yield first
    yield from rest


def _lines(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for line in text.splitlines():
            for start in range(0, len(line), _LONGEST_LINE):
                yield line[start : start + _LONGEST_LINE]
