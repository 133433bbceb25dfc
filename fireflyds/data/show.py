"""Formats a token store for the terminal: counts, length histogram, and samples with the learned tokens marked."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from fireflyds.config import PrepareConfig
from fireflyds.data.chat_template import find_template
from fireflyds.data.clean.cleaner import Cleaner
from fireflyds.data.encode import encode_preference
from fireflyds.data.read.records import RejectedRow
from fireflyds.data.read.sources import MARKERS, read_part, source_parts
from fireflyds.data.store.store import TokenStore
from fireflyds.types import Encoder, Example, Sample

_BAR = 40


def format_manifest(manifest: dict[str, Any]) -> str:
    """Returns a table of the rows read, kept, dropped and rejected by domain, with the reasons and detected layouts."""
    header = (
        "domain",
        "read",
        "documents",
        "dialogues",
        "tokens",
        "bytes",
        "bytes/token",
        "learned",
        "unknown",
        "dropped",
        "rejected",
    )
    rows = [header]
    for domain, counts in [*manifest["per_domain"].items(), ("all", manifest["totals"])]:
        tokens = max(1, counts["tokens"])
        columns = ("read", "documents", "dialogues", "tokens", "bytes")
        rows.append(
            (
                domain,
                *(f"{counts[name]:,}" for name in columns),
                f"{counts['bytes'] / tokens:.2f}",
                f"{counts['learned'] / tokens:.1%}",
                f"{counts['unknown'] / tokens:.1%}",
                f"{counts['dropped']:,}",
                f"{counts['rejected']:,}",
            )
        )
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    lines = [
        "  ".join(
            cell.ljust(width) if not index else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    for domain, counts in manifest["per_domain"].items():
        lines += [f"{domain}: {finding}" for finding in _findings(counts)]
    return "\n".join(lines)


def _findings(counts: dict[str, Any]) -> Iterator[str]:
    """Yields what was lost, guessed or not read of the rows of a domain."""
    if counts["pairs"]:
        yield f"{counts['pairs']:,} preference pairs, each in one document"
    if counts["left_out_thoughts"]:
        yield f"the template leaves out the thoughts of {counts['left_out_thoughts']:,} earlier answers"
    if counts["unknown"]:
        yield f"{counts['unknown']:,} tokens stand for characters that the vocabulary lacks, and are lost"
    for reason, count in counts["reasons"].items():
        yield f"dropped {count:,}: {reason}"
    for name, count in counts["formats"].items():
        yield f"layout {name}: {count:,} rows"
    for marker, count in counts["markers"].items():
        yield (
            f"{count:,} rows hold text already rendered in a chat template ({marker}) and is encoded as plain text; "
            f"give such dialogues as messages, with template={MARKERS[marker]}"
        )
    for key, count in counts["unread"].items():
        yield f"key {key} not read: {count:,} rows"


def histogram(store: TokenStore) -> str:
    """Returns a text histogram of documents and tokens by document length, with bins of powers of two."""
    edges, documents, tokens = _length_histogram(store)
    max_tokens = max(tokens.max(initial=0), 1)
    lines = ["length in tokens   documents         tokens"]
    for low, count, total in zip(edges.tolist(), documents.tolist(), tokens.tolist(), strict=True):
        bar = "#" * round(_BAR * total / max_tokens)
        lines.append(f"{low:>7,}-{2 * low - 1:<8,} {count:>11,} {total:>14,} {bar}")
    return "\n".join(lines)


def _length_histogram(store: TokenStore) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the lower bin edges (powers of two), documents and tokens per bin: int64 `[bins]` each."""
    lengths = np.asarray(store.lengths, np.int64)
    powers = np.floor(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    documents = np.bincount(powers)
    tokens = np.bincount(powers, weights=lengths).astype(np.int64)
    return 1 << np.arange(len(documents)), documents, tokens


def plot_lengths(store: TokenStore, file: Path) -> None:
    """Plots tokens by domain and by document length to `file`."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4), layout="constrained")
    domains = store.manifest["per_domain"]
    left.barh(list(domains), [counts["tokens"] for counts in domains.values()])
    left.set(xlabel="tokens", title="tokens by domain")
    edges, _, tokens = _length_histogram(store)
    right.bar([str(edge) for edge in edges], tokens)
    right.tick_params(axis="x", rotation=60)
    right.set(xlabel="document length in tokens (bin start)", ylabel="tokens", title="tokens by length")
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


def format_samples(config: PrepareConfig, encoder: Encoder) -> Iterator[tuple[str, Example | str]]:
    """Yields a label and the example (or the reason for dropping it) of the first samples of each source."""
    cleaner = Cleaner(config.clean)
    chat = find_template(encoder, config.template, learn_reasoning=config.learn_reasoning)
    roles = [role.name for role in config.learn_roles]
    for source in config.data.sources:
        items = (item for part in source_parts(source) for item in read_part(source, part))
        for item in islice(items, config.inspect):
            if isinstance(item, RejectedRow):
                yield f"{item.file}:{item.line}", f"rejected: {item.reason}"
                continue
            cleaned = cleaner.clean(item.sample)
            if not isinstance(cleaned, Sample):
                yield source.path, f"dropped: {cleaned}"
                continue
            try:
                yield (
                    f"{source.path} ({item.layout})",
                    encode_preference(encoder, chat, cleaned, config.loss_on, config.preference, roles),
                )
            except ValueError as error:
                yield source.path, f"dropped: {error}"


def print_samples(config: PrepareConfig, encoder: Encoder) -> None:
    """Prints samples with learned tokens in green and between ⟦ and ⟧, which also mark them without colours."""
    console = Console(soft_wrap=True, highlight=False)
    for name, example in format_samples(config, encoder):
        console.rule(Text(name))
        if isinstance(example, str):
            console.print(Text(example, style="red"))
            continue
        text, position = Text(), 0
        for start, end in example.spans:
            text.append(_token_text(encoder, example.input_ids[position:start]), style="dim")
            text.append("⟦" + _token_text(encoder, example.input_ids[start:end]) + "⟧", style="green")
            position = end
        text.append(_token_text(encoder, example.input_ids[position:]), style="dim")
        console.print(text)
        learned = sum(end - start for start, end in example.spans)
        console.print(Text(f"{len(example.input_ids):,} tokens, {learned:,} learned", style="cyan"))


def _token_text(encoder: Encoder, ids: np.ndarray) -> str:
    """Returns the text of token ids, with special tokens by name."""
    texts: list[str] = []
    fragment_ids = encoder.fragments()
    pending: list[int] = []
    for index in ids.tolist():
        # A special token decodes to an empty string; its name is shown instead.
        if index not in fragment_ids and not encoder.decode([index]) and encoder.token(index).strip():
            texts += [encoder.decode(pending), encoder.token(index)]
            pending = []
        else:
            pending.append(index)
    return "".join([*texts, encoder.decode(pending)])
