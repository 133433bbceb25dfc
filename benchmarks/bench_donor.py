"""Bits per byte right after an expansion, by the way new rows are made, on a real pre-trained base.

    python benchmarks/bench_donor.py models/smollm2-135m wiki_en.txt out.md [kept]

The base is a byte-level model of which only the first `kept` (24,576) tokens are left: the later merges, its longer
words, are the new pieces. The donor of `init=omp` is the whole model, so its rows are of the same training: the best
case for a donor, measured against the model's own rows, which no initialisation can be expected to exceed.
"""

import json
import math
import sys
import time
from pathlib import Path

import torch
from machine import describe
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from fireflyds.config import HeadInit, RowInit
from fireflyds.tokenizer.donor import donor_rows
from fireflyds.tokenizer.fast_encoder import FastEncoder
from fireflyds.tokenizer.row_init import NewRows
from fireflyds.tokenizer.select import shares

WINDOW = 1024
WINDOWS = 16
TERMS = (8, 64)


def cut_tokenizer(document: str, kept: int) -> str:
    """The tokenizer without the tokens from `kept` on, and without their merges."""
    cut = json.loads(document)
    model = cut["model"]
    model["vocab"] = {token: index for token, index in model["vocab"].items() if index < kept}
    pairs = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in model["merges"]]
    model["merges"] = [list(pair) for pair in pairs if "".join(pair) in model["vocab"]]
    return json.dumps(cut)


@torch.no_grad()
def bits_per_byte(model: torch.nn.Module, windows: torch.Tensor, num_bytes: int) -> float:
    nats = sum(float(model(row[None], labels=row[None]).loss) * (len(row) - 1) for row in windows)
    return nats / math.log(2) / num_bytes


def main() -> None:
    folder, text, out = Path(sys.argv[1]), Path(sys.argv[2]).read_text(encoding="utf-8"), Path(sys.argv[3])
    kept = int(sys.argv[4]) if len(sys.argv) > 4 else 24_576
    document = (folder / "tokenizer.json").read_text(encoding="utf-8")
    whole, base = Tokenizer.from_str(document), FastEncoder(cut_tokenizer(document, kept))
    ids = whole.encode(text, add_special_tokens=False).ids[: WINDOW * WINDOWS]
    num_bytes = len(whole.decode(ids).encode())
    num_new = sum(index >= kept for index in ids)
    windows = torch.tensor(ids).view(-1, WINDOW)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    embeddings = model.get_input_embeddings().weight.data
    own = embeddings.clone()
    encoder = FastEncoder(document)
    fragments = encoder.fragments()
    texts = [None if index in fragments else encoder.token(index) for index in range(kept, len(own))]
    every_row = list(range(kept))
    old_ids = [every_row if piece is None else base.encode(piece) for piece in texts]
    rest = text[len(whole.decode(ids)) :]
    frequency = shares(base, [rest])
    rows = [f"| the model's own rows | {bits_per_byte(model, windows, num_bytes):.4f} | |"]
    sums = {}
    for terms in TERMS:
        started = time.perf_counter()
        donated = donor_rows(folder, base, texts, terms)
        sums[f"omp, {terms} terms"] = (donated, time.perf_counter() - started)
    for name in ("mean", "weighted", "random", *sums):
        donated, seconds = sums.get(name, (None, 0.0))
        init = RowInit[name.split(",")[0]]
        pair = donated and (donated.embeddings, donated.head)
        new = NewRows(kept, old_ids, init, 42, frequency, HeadInit.same, pair)
        embeddings[kept:] = new.make(own)
        found = f"{bits_per_byte(model, windows, num_bytes):.4f}"
        rows.append(f"| {name} | {found} | {f'{seconds:.0f}' if seconds else ''} |")
        print(rows[-1], flush=True)
    common = sums[f"omp, {TERMS[0]} terms"][0].counts["common"]
    lines = [
        "# New rows of a real base before any training: bits per byte, by initialisation",
        "",
        describe("torch", "transformers"),
        "",
        f"{folder.name}: {kept:,} of its {len(own):,} tokens are the base, the other {len(texts):,} are new pieces; "
        f"tied embeddings. {len(ids):,} tokens of English text in windows of {WINDOW:,}, {num_new:,} of them new "
        f"pieces. Donor: the whole model, {common:,} tokens in common, which is the best case for a donor. Baselines: "
        "mean, weighted, random in the same run.",
        "",
        "| init | bits per byte | seconds to make |",
        "|---|---:|---:|",
        *rows,
        "",
    ]
    out.write_text("\n".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
