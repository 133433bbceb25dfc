"""Raw text and dialogues to a token store.

    python launch/prepare.py data=corpus.jsonl tokenizer=models/llama-2-7b-zh out=stores/cpt
    python launch/prepare.py data=demo_cpt tokenizer=runs/demo/expanded
    python launch/prepare.py data='dialogues/*.json' tokenizer=models/llama-2-7b-zh template=llama2 out=stores/sft

`data` is a file, a folder, a glob, or an option of `conf/data`. The same command again re-uses a store that is whole.
"""

import functools
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fireflyds import app, registry
from fireflyds.config import PrepareConfig, SourceConfig
from fireflyds.data.encode import encode_all
from fireflyds.data.files import Rejected, find_files
from fireflyds.data.sources import read_source
from fireflyds.data.store import MANIFEST, StoreWriter, read_manifest
from fireflyds.directories import write_aside
from fireflyds.errors import UserError
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.types import Encoder, Sample


def prepare(config: PrepareConfig) -> None:
    out = Path(config.out or config.data.store)
    if not config.data.sources:
        raise UserError(
            "data.sources is empty: give data=<file, folder or glob> or an option of conf/data that lists sources"
        )
    if out == Path():
        raise UserError("out is empty and data.store too: give out=<folder>")
    registry.find("fireflyds.data.templates", config.template)
    encoder = load_encoder(config.tokenizer)
    made_from = provenance(config, encoder)
    if (out / MANIFEST).exists() and read_manifest(out)["made_from"] == made_from:
        print(f"{out}: whole and made from the same sources, tokenizer and template; nothing to do")
        return
    with write_aside(out, marker=MANIFEST) as folder:
        totals = write_store(config, encoder, folder, made_from)
    print(
        f"wrote {out}: {totals['documents']:,} documents, {totals['tokens']:,} tokens, {totals['bytes']:,} bytes, "
        f"{totals['dropped']:,} dropped, {totals['rejected']:,} rejected"
    )
    if totals["rejected"]:
        print(f"rejected rows, with file, line and reason: {out / 'rejected.jsonl'}")


def provenance(config: PrepareConfig, encoder: Encoder) -> dict[str, Any]:
    """What a store is made from; equal for two stores with equal contents."""
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
    return {"tokenizer": encoder.fingerprint(), "template": config.template, "sources": sources}


def write_store(config: PrepareConfig, encoder: Encoder, folder: Path, made_from: dict[str, Any]) -> dict[str, int]:
    writer = StoreWriter(folder, encoder.vocab_size)
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

            load = functools.partial(load_encoder, config.tokenizer)
            for encoded in encode_all(load, config.template, samples(), config.workers):
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


if __name__ == "__main__":
    app.main(prepare, __doc__)
