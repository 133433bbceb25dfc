"""From a corpus or a list of pieces to the rows that are added, and how many."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from fireflyds.config import ExpandConfig, VocabSizeRule
from fireflyds.errors import UserError
from fireflyds.tokenizer.base import Base
from fireflyds.tokenizer.bpe import Step
from fireflyds.tokenizer.learn import common_characters, count_words, learn_pieces
from fireflyds.tokenizer.merge import MergePlan, drop_unreachable, fill_missing_merges, plan_merge
from fireflyds.tokenizer.sample import CorpusSample
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.tokenizer.select import Point, by_saving, curve, knee, savings
from fireflyds.tokenizer.verify import VerificationResult

# Pieces that the report lists of either end.
_LISTED = 40


@dataclass(slots=True)
class Expansion:
    """A plan, with what its size was chosen by. `saved` is by piece, on the sample; empty without a corpus."""

    plan: MergePlan
    asked: int
    saved: dict[str, int] = field(default_factory=dict)
    points: list[Point] = field(default_factory=list)
    knees: dict[str, int] = field(default_factory=dict)


def plan_expansion(
    config: ExpandConfig, base: Base, scripts: Scripts, given: list[str], sample: CorpusSample | None
) -> Expansion:
    """The pieces that the configuration asks for, as rows behind the base's.

    Raises:
        UserError: see the three ways below.
    """
    if sample and not given:
        return _learnt(config, base, scripts, sample)
    if config.cure:
        return _cured(config, base, scripts, given, sample)
    return _raw(config, base, scripts, given)


def describe(base: Base, found: Expansion, checks: list[VerificationResult]) -> dict[str, Any]:
    """What was done, for the report."""

    def readable(pieces: Iterable[str]) -> list[str]:
        return [text if (text := base.text(piece)) is not None else base.as_bytes(piece).hex(" ") for piece in pieces]

    plan, order = found.plan, sorted(found.saved, key=lambda piece: -found.saved[piece])
    ranked = [piece for piece in order if base.text(piece) is not None]
    return {
        "vocab_size_before": base.num_tokens,
        "vocab_size_after": base.num_tokens + len(plan.steps),
        "pieces": {
            "asked": found.asked,
            "present": len(plan.present),
            "added": len(plan.steps) - len(plan.intermediates) - len(plan.filled),
            "intermediates": readable(plan.intermediates),
            "filled": readable(plan.filled),
            "dropped": dict(zip(readable(plan.dropped), plan.dropped.values(), strict=True)),
        },
        "checks": [check.as_dict() for check in checks],
        "dead": readable(checks[0].failures),
        "curve": [point.as_dict() for point in found.points],
        "knees": found.knees,
        "most_useful": [[base.text(piece), found.saved[piece]] for piece in ranked[:_LISTED]],
        "rarest": [[base.text(piece), found.saved[piece]] for piece in ranked[-_LISTED:]],
        "model": {},
    }


def _learnt(config: ExpandConfig, base: Base, scripts: Scripts, sample: CorpusSample) -> Expansion:
    """The pieces of the sample that save most, in as many rows as `num_pieces`, the curve and the multiple allow.

    Raises:
        UserError: no text of the scripts, or no row left.
    """
    words = count_words(sample.learn, scripts)
    characters = common_characters(words, scripts, config.min_count)
    learnt = learn_pieces(
        words,
        base.encoder(plan_merge(base, characters, scripts).steps),
        algorithm=config.algorithm,
        num_pieces=config.num_pieces,
        max_piece_length=config.max_piece_length,
    )
    plan = plan_merge(base, characters + learnt, scripts)
    drop_unreachable(base, plan)
    # Nobody asked for these by name; only characters that cannot be pieces are worth a word in the report.
    given_up = {piece: reason for piece, reason in plan.dropped.items() if len(base.text(piece) or "") == 1}
    found = _chosen_from(config, base, plan, sample, least=config.min_count)
    if not found.saved:
        raise UserError(
            f"corpus={config.corpus}: no piece of {', '.join(scripts.names)} saves min_count={config.min_count} tokens in the "
            f"{sample.characters:,} characters sampled ({len(given_up):,} characters cannot be pieces of this base). "
            "Give more text of these scripts, a larger sample_characters, or a smaller min_count"
        )
    found.asked = len(set(characters + learnt))
    most = found.knees.get(config.size.name, config.num_pieces)
    rows = _rows(config, base, min(most, len(found.saved)), upwards=False)
    plan.keep(set(by_saving(plan, found.saved)[:rows]), "")
    plan.dropped = given_up
    found.saved = {step.piece: found.saved[step.piece] for step in plan.steps}
    return found


def _cured(
    config: ExpandConfig, base: Base, scripts: Scripts, texts: list[str], sample: CorpusSample | None
) -> Expansion:
    """Given pieces, cured; where there is a limit, those that save most (without a corpus: that stand first).

    Raises:
        UserError: nothing would be added, or the limit leaves no row.
    """
    plan = plan_merge(base, texts, scripts)
    drop_unreachable(base, plan)
    if not plan.steps:
        piece, reason = next(iter(plan.dropped.items()), ("", ""))
        why = f", the first {base.text(piece)!r}: {reason}" if reason else ""
        raise UserError(
            f"pieces={config.pieces}: of {len(texts):,} pieces {len(plan.present):,} are in the base already and "
            f"{len(plan.dropped):,} cannot be merged{why}. Give other pieces, or other scripts"
        )
    found = _chosen_from(config, base, plan, sample, least=0) if sample else Expansion(plan, 0)
    found.asked = len(texts)
    most = found.knees.get(config.size.name, len(plan.steps))
    rows = _rows(config, base, most, upwards=True)
    order = by_saving(plan, found.saved) if found.saved else [step.piece for step in plan.steps]
    if rows < len(order):
        limit = (
            f"max_vocab_size={config.max_vocab_size}"
            if config.size is VocabSizeRule.fixed
            else f"size={config.size.name}"
        )
        plan.keep(set(order[:rows]), f"left out for {limit}" + (": others save more" if found.saved else ""))
    if found.saved:
        found.saved = {step.piece: found.saved[step.piece] for step in plan.steps}
    fill_missing_merges(base, plan, scripts, base.num_tokens + rows)
    return found


def _raw(config: ExpandConfig, base: Base, scripts: Scripts, texts: list[str]) -> Expansion:
    """Given pieces as they are: what the base does not have is appended in order, reachable or not.

    Raises:
        UserError: nothing would be added, or more than the limit allows.
    """
    pieces = list(dict.fromkeys(base.spelled(text) for text in texts))
    new = [piece for piece in pieces if not base.knows(piece)]
    plan = MergePlan(
        steps=[Step(piece, None) for piece in new], present=[piece for piece in pieces if base.knows(piece)]
    )
    if not new:
        raise UserError(f"pieces={config.pieces}: all {len(pieces):,} are in the base already. Give other pieces")
    if 0 < config.max_vocab_size < base.num_tokens + len(new):
        raise UserError(
            f"max_vocab_size={config.max_vocab_size:,}: the base's {base.num_tokens:,} tokens and {len(new):,} new "
            "pieces are more, and cure=false leaves none out. Raise the limit, or let cure=true choose"
        )
    fill_missing_merges(base, plan, scripts, base.num_tokens + _rows(config, base, len(new), upwards=True))
    return Expansion(plan, len(texts))


def _chosen_from(config: ExpandConfig, base: Base, plan: MergePlan, sample: CorpusSample, *, least: int) -> Expansion:
    """What each step saves, the curve of sizes, and its knees. Steps that save less than `least` go."""
    saved = savings(base, plan, sample.learn)
    plan.keep({piece for piece, count in saved.items() if count >= least}, f"saves fewer than {least} tokens")
    saved = {step.piece: saved[step.piece] for step in plan.steps}
    most = config.num_pieces or len(saved)
    points = curve(base, plan, by_saving(plan, saved)[:most], sample.held_out)
    if not saved:
        return Expansion(plan, 0)
    knees = {by.name: knee(points, by).rows for by in (VocabSizeRule.knee, VocabSizeRule.alp)}
    return Expansion(plan, 0, saved, points, knees)


def _rows(config: ExpandConfig, base: Base, most: int, *, upwards: bool) -> int:
    """New rows so that the vocabulary is a multiple, and no larger than allowed."""
    multiple = config.vocab_multiple
    size = base.num_tokens + most
    size += -size % multiple if upwards else -(size % multiple)
    if config.max_vocab_size:
        size = min(size, config.max_vocab_size - config.max_vocab_size % multiple)
    if size <= base.num_tokens:
        limit = f"max_vocab_size={config.max_vocab_size:,}, " if config.max_vocab_size else ""
        raise UserError(
            f"{limit}vocab_multiple={multiple}: the base has {base.num_tokens:,} tokens and {most:,} would be added; "
            f"no multiple of {multiple} lies between, the next is {(base.num_tokens // multiple + 1) * multiple:,}. "
            "Ask for more pieces, a larger limit or a smaller multiple"
        )
    return size - base.num_tokens
