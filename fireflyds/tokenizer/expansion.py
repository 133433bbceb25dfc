"""Planning of an expansion: selects the pieces to add and their number, from a corpus or a list of pieces."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fireflyds.config import ExpandConfig, VocabSizeRule
from fireflyds.errors import UserError
from fireflyds.tokenizer.base import Base
from fireflyds.tokenizer.bpe import Step
from fireflyds.tokenizer.learn import common_characters, count_words, learn_pieces
from fireflyds.tokenizer.sample import CorpusSample
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.tokenizer.select import Point, by_saving, curve, knee, savings
from fireflyds.tokenizer.verify import VerificationResult
from fireflyds.tokenizer.vocabulary_merge import MergePlan, drop_unreachable, fill_missing_merges, plan_merge

# Number of pieces in each of the report's two lists (most useful, rarest).
_NUM_LISTED = 40


@dataclass(slots=True)
class Expansion:
    """A merge plan and the measurements behind its size.

    `asked` is the number of candidate pieces. `saved` maps each piece to the tokens it saves on the sample, `points` is
    the curve of vocabulary sizes, and `knees` maps each size rule to its number of rows; all empty without a corpus.
    """

    plan: MergePlan
    asked: int
    saved: dict[str, int] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    knees: dict[str, int] = field(default_factory=dict)


def plan_expansion(
    config: ExpandConfig, base: Base, scripts: Scripts, given: list[str], sample: CorpusSample | None
) -> Expansion:
    """Plans the rows to append to the base: pieces learned from the sample, or the `given` ones.

    Raises:
        UserError: no piece can be added, or the size limits cannot be satisfied.
    """
    if sample and not given:
        return _plan_learned(config, base, scripts, sample)
    if config.cure:
        return _plan_given(config, base, scripts, given, sample)
    return _plan_without_merges(config, base, scripts, given)


def describe(base: Base, expansion: Expansion, checks: list[VerificationResult]) -> dict[str, Any]:
    """Returns the expansion's part of `report.json`."""

    def readable(pieces: Iterable[str]) -> list[str]:
        return [text if (text := base.text(piece)) is not None else base.as_bytes(piece).hex(" ") for piece in pieces]

    plan, order = expansion.plan, sorted(expansion.saved, key=lambda piece: -expansion.saved[piece])
    ranked = [piece for piece in order if base.text(piece) is not None]
    return {
        "vocab_size_before": base.num_tokens,
        "vocab_size_after": base.num_tokens + len(plan.steps),
        "pieces": {
            "asked": expansion.asked,
            "present": len(plan.present),
            "added": len(plan.steps) - len(plan.intermediates) - len(plan.filled),
            "intermediates": readable(plan.intermediates),
            "filled": readable(plan.filled),
            "dropped": dict(zip(readable(plan.dropped), plan.dropped.values(), strict=True)),
        },
        "checks": [check.as_dict() for check in checks],
        "dead": readable(checks[0].failures),
        "curve": [point.as_dict() for point in expansion.points],
        "knees": expansion.knees,
        "most_useful": [[base.text(piece), expansion.saved[piece]] for piece in ranked[:_NUM_LISTED]],
        "rarest": [[base.text(piece), expansion.saved[piece]] for piece in ranked[-_NUM_LISTED:]],
        "model": {},
    }


def _plan_learned(config: ExpandConfig, base: Base, scripts: Scripts, sample: CorpusSample) -> Expansion:
    """Plans the learned pieces that save the most tokens, limited by `num_pieces`, the size rule and the multiple.

    Raises:
        UserError: the corpus has no text of the scripts, or the limits allow no new row.
    """
    words = count_words(sample.learn, scripts)
    characters = common_characters(words, scripts, config.min_count)
    learned = learn_pieces(
        words,
        base.encoder(plan_merge(base, characters, scripts).steps),
        algorithm=config.algorithm,
        num_pieces=config.num_pieces,
        max_piece_length=config.max_piece_length,
    )
    plan = plan_merge(base, characters + learned, scripts)
    drop_unreachable(base, plan)
    # Learned pieces were not requested by the user: the report lists only single characters that cannot be pieces.
    rejected = {piece: reason for piece, reason in plan.dropped.items() if len(base.text(piece) or "") == 1}
    expansion = _measure(config, base, plan, sample, min_saved=config.min_count)
    if not expansion.saved:
        raise UserError(
            f"no piece of {', '.join(scripts.names)} saves min_count={config.min_count} tokens in the "
            f"{sample.characters:,} characters sampled ({len(rejected):,} characters cannot be pieces of this base)",
            key="corpus",
            value=config.corpus,
            remedy="Give more text of these scripts, a larger sample_characters, or a smaller min_count",
        )
    expansion.asked = len(set(characters + learned))
    max_rows = expansion.knees.get(config.size.name, config.num_pieces)
    rows = _num_new_rows(config, base, min(max_rows, len(expansion.saved)), upwards=False)
    plan.keep(set(by_saving(plan, expansion.saved)[:rows]), "")
    plan.dropped = rejected
    expansion.saved = {step.piece: expansion.saved[step.piece] for step in plan.steps}
    return expansion


def _plan_given(
    config: ExpandConfig, base: Base, scripts: Scripts, texts: list[str], sample: CorpusSample | None
) -> Expansion:
    """Plans the given pieces with the merges they need; under a limit, those that save the most tokens.

    Without a corpus, the first pieces of the list are kept.

    Raises:
        UserError: nothing would be added, or the limits allow no new row.
    """
    plan = plan_merge(base, texts, scripts)
    drop_unreachable(base, plan)
    if not plan.steps:
        piece, reason = next(iter(plan.dropped.items()), ("", ""))
        first_reason = f", the first {base.text(piece)!r}: {reason}" if reason else ""
        raise UserError(
            f"of {len(texts):,} pieces {len(plan.present):,} are in the base already and {len(plan.dropped):,} cannot "
            f"be merged{first_reason}",
            key="pieces",
            value=config.pieces,
            remedy="Give different pieces or scripts",
        )
    expansion = _measure(config, base, plan, sample, min_saved=0) if sample else Expansion(plan, 0)
    expansion.asked = len(texts)
    max_rows = expansion.knees.get(config.size.name, len(plan.steps))
    rows = _num_new_rows(config, base, max_rows, upwards=True)
    order = by_saving(plan, expansion.saved) if expansion.saved else [step.piece for step in plan.steps]
    if rows < len(order):
        limit = (
            f"max_vocab_size={config.max_vocab_size}"
            if config.size is VocabSizeRule.fixed
            else f"size={config.size.name}"
        )
        plan.keep(set(order[:rows]), f"left out for {limit}" + (": others save more" if expansion.saved else ""))
    if expansion.saved:
        expansion.saved = {step.piece: expansion.saved[step.piece] for step in plan.steps}
    fill_missing_merges(base, plan, scripts, base.num_tokens + rows)
    return expansion


def _plan_without_merges(config: ExpandConfig, base: Base, scripts: Scripts, texts: list[str]) -> Expansion:
    """Plans the given pieces without merges (`cure=false`): those new to the base are appended in order, even if
    unreachable.

    Raises:
        UserError: nothing would be added, or more than the limit allows.
    """
    pieces = list(dict.fromkeys(base.spelled(text) for text in texts))
    new = [piece for piece in pieces if not base.knows(piece)]
    plan = MergePlan(
        steps=[Step(piece, None) for piece in new], present=[piece for piece in pieces if base.knows(piece)]
    )
    if not new:
        raise UserError(
            f"all {len(pieces):,} are already in the base",
            key="pieces",
            value=config.pieces,
            remedy="Give different pieces",
        )
    if 0 < config.max_vocab_size < base.num_tokens + len(new):
        raise UserError(
            f"the base's {base.num_tokens:,} tokens and {len(new):,} new pieces exceed it, and cure=false drops none",
            key="max_vocab_size",
            value=f"{config.max_vocab_size:,}",
            remedy="Raise the limit, or set cure=true to select",
        )
    fill_missing_merges(base, plan, scripts, base.num_tokens + _num_new_rows(config, base, len(new), upwards=True))
    return Expansion(plan, len(texts))


def _measure(config: ExpandConfig, base: Base, plan: MergePlan, sample: CorpusSample, *, min_saved: int) -> Expansion:
    """Measures the tokens saved by each step, the curve of sizes and its knees; drops steps below `min_saved`."""
    saved = savings(base, plan, sample.learn)
    plan.keep({piece for piece, count in saved.items() if count >= min_saved}, f"saves fewer than {min_saved} tokens")
    saved = {step.piece: saved[step.piece] for step in plan.steps}
    max_rows = config.num_pieces or len(saved)
    points = curve(base, plan, by_saving(plan, saved)[:max_rows], sample.held_out)
    if not saved:
        return Expansion(plan, 0)
    knees = {by.name: knee(points, by).rows for by in (VocabSizeRule.knee, VocabSizeRule.alp)}
    return Expansion(plan, 0, saved, points, knees)


def _num_new_rows(config: ExpandConfig, base: Base, count: int, *, upwards: bool) -> int:
    """Returns the number of new rows that makes the vocabulary size a multiple and at most `max_vocab_size`.

    Raises:
        UserError: no such number is positive.
    """
    multiple = config.vocab_multiple
    size = base.num_tokens + count
    size += -size % multiple if upwards else -(size % multiple)
    if config.max_vocab_size:
        size = min(size, config.max_vocab_size - config.max_vocab_size % multiple)
    if size <= base.num_tokens:
        limit = f"max_vocab_size={config.max_vocab_size:,}, " if config.max_vocab_size else ""
        raise UserError(
            f"the base has {base.num_tokens:,} tokens and {count:,} would be added; no multiple of {multiple} lies "
            f"between, the next is {(base.num_tokens // multiple + 1) * multiple:,}",
            key=f"{limit}vocab_multiple",
            value=multiple,
            remedy="Ask for more pieces, a larger limit or a smaller multiple",
        )
    return size - base.num_tokens
