"""Formats the report of an expansion: `report.md`, `report.png` and the summary on the console."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fireflyds.tokenizer.report.stats import CONTEXT

# Bytes per parameter in mixed-precision Adam: 16-bit weight and gradient,
# 32-bit weight and two moments (arXiv 1910.02054, section 3.1).
TRAINING_BYTES = 16


def format_comparison(rows: Sequence[dict[str, Any]], names: tuple[str, str]) -> list[str]:
    """Returns the lines of a Markdown table that compares two tokenizers on texts."""
    lines = [
        f"`{names[0]}` → `{names[1]}`",
        "",
        "| domain | language | characters | tokens | | characters per token | bytes per token | byte fallback | "
        f"characters in {CONTEXT:,} tokens |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        old, new = row["before"], row["after"]
        change = new["tokens"] / max(old["tokens"], 1) - 1
        lines.append(
            f"| {row['domain']} | {row['language']} | {old['characters']:,} | {old['tokens']:,} → {new['tokens']:,} | "
            f"{change:+.1%} | {old['characters_per_token']:.2f} → {new['characters_per_token']:.2f} | "
            f"{old['bytes_per_token']:.2f} → {new['bytes_per_token']:.2f} | {old['byte_fallback_rate']:.1%} → "
            f"{new['byte_fallback_rate']:.1%} | {old['characters_in_context']:,.0f} → "
            f"{new['characters_in_context']:,.0f} |"
        )
    return lines


def format_summary(report: dict[str, Any]) -> str:
    """Returns the summary that the command prints."""
    pieces = report["pieces"]
    lines = [
        f"vocabulary: {report['vocab_size_before']:,} -> {report['vocab_size_after']:,} tokens; {pieces['added']:,} "
        f"pieces, {len(pieces['intermediates']):,} intermediates and {len(pieces['filled']):,} characters added; "
        f"{pieces['present']:,} were already in the base, {len(pieces['dropped']):,} dropped"
    ]
    lines += [
        f"{'does not hold' if check['failed'] else 'holds'}: {check['rule']} "
        f"({check['tried'] - check['failed']:,} of {check['tried']:,})"
        for check in report["checks"]
    ]
    for row in report["measured"]:
        old, new = row["before"], row["after"]
        change = new["tokens"] / max(1, old["tokens"]) - 1
        lines.append(
            f"{row['domain']}, {row['language']}: tokens per character {old['tokens_per_character']:.4f} -> "
            f"{new['tokens_per_character']:.4f} ({change:+.2%})"
        )
    return "\n".join(lines)


def format_report(report: dict[str, Any]) -> str:
    """Returns the text of `report.md`."""
    pieces = report["pieces"]
    lines = [
        "# Vocabulary expansion",
        "",
        f"{report['vocab_size_before']:,} → {report['vocab_size_after']:,} tokens: {pieces['added']:,} of "
        f"{pieces['asked']:,} candidates, {len(pieces['intermediates']):,} intermediates, {len(pieces['filled']):,} "
        f"filler characters. {pieces['present']:,} were already in the base, {len(pieces['dropped']):,} were dropped.",
        "",
        f"Dead pieces: {len(report['dead'])}.",
        "",
        "| check | cases | failed |",
        "|---|---:|---:|",
        *(f"| {check['rule']} | {check['tried']:,} | {check['failed']:,} |" for check in report["checks"]),
        "",
        "## Fit",
        "",
        *(
            format_comparison(report["measured"], ("base", "expanded"))
            if report["measured"]
            else ["No text to measure was given."]
        ),
        "",
        "## Cost of the new rows",
        "",
        _costs(report),
    ]
    if report["curve"]:
        lines += ["", "## How many pieces", "", *_curve(report)]
    if report["most_useful"]:
        lines += [
            "",
            "## Pieces",
            "",
            "Tokens saved in the sample, most useful pieces: " + _piece_counts(report["most_useful"]),
        ]
        lines += ["", "Rarest pieces: " + _piece_counts(report["rarest"])]
    if pieces["intermediates"]:
        lines += ["", "Intermediates: " + " ".join(_quoted(piece) for piece in pieces["intermediates"])]
    if pieces["dropped"]:
        lines += ["", "Dropped:", "", *_dropped_by_reason(pieces["dropped"])]
    return "\n".join(lines) + "\n"


def _costs(report: dict[str, Any]) -> str:
    rows = report["vocab_size_after"] - report["vocab_size_before"]
    model = report["model"]
    if not model:
        return f"{rows:,} rows in the embeddings and, unless tied, in the head (the base has no model weights)."
    head = "embeddings and head" if model["matrices"] == 2 else "the embeddings, to which the head is tied"
    parameters = rows * model["hidden_size"] * model["matrices"]
    mib = 2**20
    donor = model.get("donor")
    donated = (
        f" New rows from the donor, over {donor['common']:,} common tokens: {donor['single']:,} pieces are one token "
        f"there, {donor['several']:,} the mean of several; {donor['none']:,} are the mean of the base's rows."
        if donor
        else ""
    )
    return (
        f"{rows:,} rows of {model['hidden_size']:,} in {head}: {parameters:,} parameters, {2 * parameters / mib:,.1f} "
        f"MiB in 16 bits, {TRAINING_BYTES * parameters / mib:,.1f} MiB in full training with Adam ({TRAINING_BYTES} "
        f"bytes each). The model: {model['parameters_before']:,} → {model['parameters_after']:,} parameters."
        f"{donated}"
    )


def _curve(report: dict[str, Any]) -> list[str]:
    marks: dict[int, str] = {}
    for name, rows in report["knees"].items():
        marks[rows] = f"{marks[rows]}, {name}" if rows in marks else name
    lines = ["| new rows | tokens on held-out lines | average log probability | |", "|---:|---:|---:|---|"]
    lines += [
        f"| {point['rows']:,} | {point['tokens']:,} | {point['alp']:.1f} | {marks.get(point['rows'], '')} |"
        for point in report["curve"]
    ]
    return [*lines, "", "`knee`: point farthest above the chord, by tokens saved; `alp`: by average log probability."]


def _piece_counts(pieces: Sequence[Sequence[Any]]) -> str:
    return ", ".join(f"{_quoted(piece)} {count:,}" for piece, count in pieces)


def _dropped_by_reason(dropped: dict[str, str]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for piece, reason in dropped.items():
        by_reason.setdefault(reason.split(": ")[0], []).append(piece)
    return [
        f"- {reason} ({len(pieces):,}): {' '.join(map(_quoted, pieces[:100]))}" for reason, pieces in by_reason.items()
    ]


def _quoted(piece: str) -> str:
    return f"`{piece}`" if "`" not in piece else piece


def plot_report(report: dict[str, Any], file: Path) -> None:
    """Writes `report.png`: the curve of vocabulary sizes, and characters per token by domain."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (curve_axes, bar_axes) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    rows = [point["rows"] for point in report["curve"]]
    curve_axes.plot(rows, [point["tokens"] for point in report["curve"]], marker="o")
    for name, position in report["knees"].items():
        curve_axes.axvline(position, linestyle=":", color="gray")
        curve_axes.annotate(name, (position, curve_axes.get_ylim()[1]), rotation=90, va="top", ha="right")
    curve_axes.set(xlabel="new rows", ylabel="tokens on held-out lines", title="tokens saved against rows added")
    measured = report["measured"][:-1]
    for offset, name in ((-0.2, "before"), (0.2, "after")):
        widths = [row[name]["characters_per_token"] for row in measured]
        bar_axes.barh([index + offset for index in range(len(measured))], widths, 0.4, label=name)
    bar_axes.set_yticks(range(len(measured)), [f"{row['domain']}, {row['language']}" for row in measured])
    bar_axes.set(xlabel="characters per token", title="fit")
    bar_axes.invert_yaxis()
    if measured:
        bar_axes.legend()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)
