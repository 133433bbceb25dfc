"""From the sources of a configuration to a whole token store."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from fireflyds.config import PrepareConfig, SourceConfig
from fireflyds.data.encode import encode_all
from fireflyds.data.files import Rejected, find_files
from fireflyds.data.sources import read_source
from fireflyds.data.store import StoreWriter
from fireflyds.errors import UserError
from fireflyds.types import Encoder, Sample


def provenance(config: PrepareConfig, tokenizer: str) -> dict[str, Any]:
    """What a store is made from; equal for two stores with equal contents. `tokenizer` is its fingerprint."""
    sources = [
        {
            "path": source.path,
            "domain": source.domain,
            "format": source.format,
            "split": source.split.name,
            "files": {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in find_files(source.path)},
        }
        for source in config.data.sources
    ]
    return {"tokenizer": tokenizer, "template": config.template, "sources": sources}


def write_store(
    config: PrepareConfig,
    load_encoder: Callable[[], Encoder],
    vocab_size: int,
    folder: Path,
    made_from: dict[str, Any],
) -> dict[str, int]:
    """Encode every source into a store folder and return its totals.

    Raises:
        UserError: no document could be used.
    """
    writer = StoreWriter(folder, vocab_size)
    totals = Counter(dict.fromkeys(("documents", "tokens", "bytes", "dropped", "rejected"), 0))
    domains: dict[str, Counter[str]] = {}
    with (folder / "rejected.jsonl").open("w", encoding="utf-8") as rejects:
        for source in config.data.sources:
            counts = domains.setdefault(source.domain, Counter())

            def samples(source: SourceConfig = source, counts: Counter[str] = counts) -> Iterator[Sample]:
                for item in read_source(source):
                    if isinstance(item, Rejected):
                        row = {"file": item.file, "line": item.line, "reason": item.reason}
                        rejects.write(json.dumps(row, ensure_ascii=False) + "\n")
                        counts["rejected"] += 1
                    else:
                        yield item

            for encoded in encode_all(load_encoder, config.template, samples(), config.workers):
                if isinstance(encoded, str):
                    counts["dropped"] += 1
                    counts[f"dropped: {encoded}"] += 1
                    continue
                writer.add(encoded, source.domain)
                counts["documents"] += 1
                counts["dialogues"] += not encoded.is_document
                counts["tokens"] += len(encoded.input_ids)
                counts["bytes"] += encoded.num_bytes
    for counts in domains.values():
        totals.update({name: counts[name] for name in totals})
    if totals["documents"] == 0:
        first = (folder / "rejected.jsonl").read_text(encoding="utf-8").partition("\n")[0]
        reasons = sorted(name for counts in domains.values() for name in counts if name.startswith("dropped: "))
        why = f"; the first rejected row: {first}" if first else f"; {reasons[0]}" if reasons else ""
        raise UserError(f"{config.data.sources[0].path}: no document could be used{why}")
    # Only a store with dialogues in it speaks a template, which the export then writes.
    template = config.template if any(counts["dialogues"] for counts in domains.values()) else None
    writer.close(
        {
            "template": template,
            "made_from": made_from,
            "totals": dict(totals),
            "per_domain": {k: dict(v) for k, v in domains.items()},
        }
    )
    return dict(totals)
