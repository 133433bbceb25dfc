"""Learn SentencePiece BPE pieces from text."""

import io
import re
from collections.abc import Iterable, Iterator
from typing import Any

import sentencepiece
from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds.errors import UserError

NORMAL = sp_pb2.ModelProto.SentencePiece.NORMAL

# Han (with extensions and compatibility forms), and CJK and full-width punctuation.
HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
CJK_PUNCTUATION = "\u3001-\u3006\u3008-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65‘’“”—…·"
_HAN_OR_PUNCTUATION = re.compile(f"[{HAN}]+|[{CJK_PUNCTUATION}]")
# A line without a break is cut here: the trainer is quadratic in the length of what it cannot split.
_LONGEST_LINE = 1000


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
        _lines(texts), vocab_size, max_piece_length=max_piece_length, byte_fallback=True, add_dummy_prefix=True
    )


def learn_chinese_pieces(texts: Iterable[str], *, num_pieces: int, max_piece_length: int) -> list[str]:
    """Pieces of Han characters, most useful first; single characters and CJK punctuation are among them.

    No piece crosses punctuation, a space or another script. Returns at most `num_pieces`.

    Raises:
        UserError: the text has no Han characters.
    """
    runs = (run for text in texts for run in _HAN_OR_PUNCTUATION.findall(text))
    # Three more for the trainer's own <unk>, <s> and </s>.
    model = _train(runs, num_pieces + 3, max_piece_length=max_piece_length, byte_fallback=False, add_dummy_prefix=False)
    # A tab and a newline cannot be in a run, and the dummy prefix is off: all normal pieces are Chinese,
    # except the bare space mark that the trainer always adds.
    return [piece for piece in normal_pieces(model) if has_new_script(piece)]


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
            character_coverage=0.9995,
            max_sentencepiece_length=max_piece_length,
            minloglevel=2,
            **options,
        )
    except RuntimeError as error:
        needed = re.search(r"smaller than required_chars\. (\d+) vs (\d+)", str(error))
        if needed:
            raise UserError(
                f"{vocab_size} pieces are too few: the text's characters alone need {needed.group(2)}. "
                "Ask for more pieces"
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
