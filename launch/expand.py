"""Expand a base model's vocabulary: learn or read pieces, merge them, verify the merge, initialise embedding rows.

    python launch/expand.py base=models/llama-2-7b corpus=zh.txt num_pieces=12000 out=models/llama-2-7b-zh
    python launch/expand.py base=llama2.model pieces=chinese_sp.model out=merged
    python launch/expand.py report=only base=llama2.model other=models/qwen corpus=zh.txt

`base` is a Hugging Face directory (writes a model and a tokenizer) or a tokenizer alone (writes a tokenizer).
Also writes `report.md`, `report.json` and `report.png`.
"""

import json
import shutil
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from fireflyds import app
from fireflyds.config import ExpandConfig, PreTokenizer, ReportMode, SourceConfig
from fireflyds.data.read.sources import read_texts, size_of, source_parts
from fireflyds.errors import UserError
from fireflyds.fs import Output, atomic_dir, refuse_inputs_inside
from fireflyds.progress import counted
from fireflyds.tokenizer.base import Base, load_base
from fireflyds.tokenizer.encoder import load_encoder, model_file
from fireflyds.tokenizer.expansion import Expansion, describe, plan_expansion
from fireflyds.tokenizer.pieces import read_pieces
from fireflyds.tokenizer.report.page import format_comparison, format_report, format_summary, plot_report
from fireflyds.tokenizer.report.stats import compare_tokenizers
from fireflyds.tokenizer.sample import CorpusSample, draw_sample, lines
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.tokenizer.sentencepiece_model import disagreement, read_proto
from fireflyds.tokenizer.verify import VerificationResult, verify_expansion

# Maximum number of lines of each text used for verification.
PROOF_LINES = 20_000


def expand(config: ExpandConfig) -> None:
    """Plans, writes and verifies an expansion, or compares two tokenizers (`report=only`).

    Raises:
        UserError: an input cannot be read or used, or a property of the merge does not hold.
    """
    if config.report is ReportMode.only:
        write_comparison(config)
        return
    base_path = Path(config.base)
    refuse_inputs_inside(
        Path(config.out),
        base=config.base,
        pieces=config.pieces,
        corpus=config.corpus,
        donor=config.donor,
        **_input_paths(config.texts),
    )
    for path in config.texts.values():
        source_parts(SourceConfig(path=path))
    marks, scripts = config.pretokenizer is PreTokenizer.marks, Scripts(config.scripts)
    base = load_base(base_path, tied=not config.cure, add_bytes=config.add_bytes, marks=marks)
    pieces = read_pieces(Path(config.pieces)) if config.pieces else []
    check_models(config, base)
    # The output folder is created before the work starts, so that an unwritable target fails early.
    with atomic_dir(Path(config.out), Output("expand")) as out:
        sample = None
        if config.corpus:
            texts = counted("expand: sampling the corpus", read_texts(config.corpus), size_of(config.corpus))
            sample = draw_sample(texts, characters=config.sample_characters, seed=config.seed)
        expansion = plan_expansion(config, base, scripts, pieces, sample)
        base.write(expansion.plan.steps, out)
        if (base_path / "config.json").is_file():  # transformers chooses the tokenizer's class by it
            shutil.copy2(base_path / "config.json", out)
        checks = verify_expansion(base, expansion.plan, scripts, out, proof_lines(config, sample), marks=marks)
        refuse_broken(config, base, checks)
        report = describe(base, expansion, checks)
        report["cut_by_marks"] = cut_words(base, scripts, sample)
        report["measured"] = [
            row.as_dict()
            for row in compare_tokenizers(base.original_encoder(), load_encoder(out), measured_texts(config, sample))
        ]
        if (base_path / "config.json").is_file():
            report |= expand_rows(config, base, expansion, sample, out)
        (out / "report.json").write_text(json.dumps(report, ensure_ascii=False, indent=2), encoding="utf-8")
        (out / "report.md").write_text(format_report(report), encoding="utf-8")
        plot_report(report, out / "report.png")
    print(format_summary(report))
    for line in notes(config, base, report):
        print(f"note: {line}")
    print(f"wrote {config.out}")


def check_models(config: ExpandConfig, base: Base) -> None:
    """Raises `UserError`, before pieces are learned, where the models cannot get or give rows."""
    base_path = Path(config.base)
    if config.donor:
        from fireflyds.tokenizer.donor import check_donor

        check_donor(Path(config.donor), base_path)
    if (base_path / "config.json").is_file():
        from fireflyds.tokenizer.rows import check_model

        check_model(base_path, base.num_tokens - base.num_added_bytes)


def notes(config: ExpandConfig, base: Base, report: dict[str, Any]) -> Iterator[str]:
    """Yields what to know of the expansion: words that are cut, rows of earlier expansions, and known differences."""
    counts = report["cut_by_marks"]
    if counts["cut"] and config.pretokenizer is PreTokenizer.base:
        yield (
            f"the base cuts {counts['cut']:,} of {counts['words']:,} words at combining marks, which no piece can "
            "cross; pretokenizer=marks keeps them whole"
        )
    earlier = report.get("model", {}).get("base_vocab_sizes", [])[:-1]
    if earlier:
        yield (
            f"the base was expanded before, at {', '.join(map(str, earlier))} rows: new_rows trains the rows of this "
            f"expansion; model.base_vocab_size={earlier[0]} trains those of the earlier one too"
        )
    if base.disagreement:
        yield f"{base.disagreement}; fireflyds encodes with SentencePiece"


def expand_rows(
    config: ExpandConfig, base: Base, expansion: Expansion, sample: CorpusSample | None, out: Path
) -> dict[str, Any]:
    """Writes the model with the new embedding rows to `out`. Returns the counts for the report, under `model`."""
    from fireflyds.tokenizer.donor import donor_rows
    from fireflyds.tokenizer.row_init import NewRows
    from fireflyds.tokenizer.rows import expand_model
    from fireflyds.tokenizer.select import shares

    num_rows = base.num_tokens - base.num_added_bytes
    # Byte pieces that the base lacks, and pieces of such bytes alone, begin as the mean of all its rows.
    every_row = list(range(num_rows))
    old_ids = [every_row] * base.num_added_bytes
    for step in expansion.plan.steps:
        old_ids.append([index for index in base.old_ids(step.piece) if index < num_rows] or every_row)
    frequency = shares(base.encoder([]), sample.learn) if sample else None
    donated = None
    if config.donor:
        texts = [None] * base.num_added_bytes + [base.text(step.piece) for step in expansion.plan.steps]
        donated = donor_rows(Path(config.donor), base.original_encoder(), texts, config.donor_terms)
    sums = donated and (donated.embeddings, donated.head)
    rows = NewRows(num_rows, old_ids, config.init, config.seed, frequency, config.init_head, sums)
    counts = expand_model(Path(config.base), out, rows)
    return {"model": counts | ({"donor": donated.counts} if donated else {})}


def cut_words(base: Base, scripts: Scripts, sample: CorpusSample | None) -> dict[str, int]:
    """Returns the numbers of words of the new scripts in the sample, and of those that the base cuts at marks."""
    words = [word for line in (sample.learn if sample else []) for word in scripts.words(line)]
    return {"words": len(words), "cut": base.num_cut_words(words)}


def proof_lines(config: ExpandConfig, sample: CorpusSample | None) -> Iterator[str]:
    """Yields the lines for verification: at most `PROOF_LINES` of the sample and of each text."""
    yield from islice((sample.held_out + sample.learn) if sample else [], PROOF_LINES)
    for path in config.texts.values():
        yield from islice(lines(read_texts(path)), PROOF_LINES)


def measured_texts(config: ExpandConfig, sample: CorpusSample | None) -> Iterator[tuple[str, str]]:
    """Yields `(domain, text)` pairs for the report: `texts`, or else the held-out lines of the corpus."""
    for domain, path in config.texts.items():
        yield from ((domain, text) for text in read_texts(path))
    if sample and not config.texts:
        yield from (("corpus", text) for text in sample.held_out)


def refuse_broken(config: ExpandConfig, base: Base, checks: list[VerificationResult]) -> None:
    """Raises `UserError` if a property of the merge does not hold, unless `cure=false` or the difference is known."""
    broken = [check for check in checks if not check.passed and not (check.of_auto_tokenizer and base.disagreement)]
    if config.cure and broken:
        raise UserError(
            f"{broken[0].rule}, but not in {len(broken[0].failures):,} of {broken[0].tried:,} cases, the first "
            f"{broken[0].failures[0][:100]!r}; nothing was written",
            key="base",
            value=config.base,
            remedy="Give another base, or cure=false, which writes the merge without this property",
        )


def _input_paths(texts: dict[str, str]) -> dict[str, str]:
    return {f"texts.{domain}": path for domain, path in texts.items()}


def write_comparison(config: ExpandConfig) -> None:
    """Prints the comparison of `base` and `other` on texts, and writes it to `out` if that is set."""
    texts = config.texts or {"corpus": config.corpus}
    pairs = ((domain, text) for domain, path in texts.items() for text in read_texts(path))
    rows = [row.as_dict() for row in compare_tokenizers(load_encoder(config.base), load_encoder(config.other), pairs)]
    table = "\n".join(format_comparison(rows, (config.base, config.other)))
    print(table)
    for path in (config.base, config.other):
        file = model_file(path)
        if file and (reason := disagreement(read_proto(file))):
            print(f"note: {path}: {reason}; fireflyds encodes with SentencePiece")
    if config.out:
        refuse_inputs_inside(Path(config.out), base=config.base, other=config.other, **_input_paths(texts))
        with atomic_dir(Path(config.out), Output("comparison of tokenizers")) as out:
            (out / "comparison.md").write_text(f"# Two tokenizers\n\n{table}\n", encoding="utf-8")
            document = {"base": config.base, "other": config.other, "measured": rows}
            (out / "comparison.json").write_text(json.dumps(document, ensure_ascii=False, indent=2), encoding="utf-8")
        print(f"wrote {config.out}")


if __name__ == "__main__":
    app.main(expand, __doc__)
