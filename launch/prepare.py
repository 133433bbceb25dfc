"""Raw text and dialogues to a token store.

    python launch/prepare.py data=corpus.jsonl tokenizer=models/llama-2-7b-zh out=stores/cpt
    python launch/prepare.py data=demo_cpt tokenizer=runs/demo/expanded
    python launch/prepare.py data='dialogues/*.json' tokenizer=models/llama-2-7b-zh template=llama2 out=stores/sft

`data` is a file, a folder, a glob, or an option of `conf/data`. The same command again re-uses a store that is whole.
"""

import functools
from pathlib import Path

from fireflyds import app, registry
from fireflyds.config import PrepareConfig
from fireflyds.data.build import provenance, write_store
from fireflyds.data.store import MANIFEST, read_manifest
from fireflyds.directories import write_aside
from fireflyds.errors import UserError
from fireflyds.tokenizer.encoder import load_encoder


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
    made_from = provenance(config, encoder.fingerprint())
    if (out / MANIFEST).exists() and read_manifest(out)["made_from"] == made_from:
        print(f"{out}: whole and made from the same sources, tokenizer and template; nothing to do")
        return
    with write_aside(out, marker=MANIFEST) as folder:
        load = functools.partial(load_encoder, config.tokenizer)
        totals = write_store(config, load, encoder.vocab_size, folder, made_from)
    print(
        f"wrote {out}: {totals['documents']:,} documents, {totals['tokens']:,} tokens, {totals['bytes']:,} bytes, "
        f"{totals['dropped']:,} dropped, {totals['rejected']:,} rejected"
    )
    if totals["rejected"]:
        print(f"rejected rows, with file, line and reason: {out / 'rejected.jsonl'}")


if __name__ == "__main__":
    app.main(prepare, __doc__)
