"""Expand a base model's vocabulary: learn or read pieces, merge them, give them embedding rows.

    python launch/expand.py base=models/llama-2-7b corpus=zh.txt num_pieces=20000 out=models/llama-2-7b-zh
    python launch/expand.py base=llama2.model pieces=chinese_sp.model out=merged

`base` is a Hugging Face directory (model and tokenizer come out) or a `.model` (a tokenizer comes out).
"""

import json
from pathlib import Path

from fireflyds import app
from fireflyds.config import ExpandConfig
from fireflyds.data.sources import read_texts
from fireflyds.directories import write_aside
from fireflyds.errors import UserError
from fireflyds.tokenizer.directory import TIES_NOTE, ties, write_tokenizer
from fireflyds.tokenizer.encoder import load_encoder, model_file
from fireflyds.tokenizer.learn import learn_chinese_pieces
from fireflyds.tokenizer.merge import merge, read_pieces, unreachable
from fireflyds.tokenizer.report import measure


def expand(config: ExpandConfig) -> None:
    base = Path(config.base)
    base_file = model_file(base)
    if base_file is None:
        raise UserError(
            f"base={base}: no SentencePiece tokenizer there. Give a directory with tokenizer.model, or a .model"
        )
    old = load_encoder(base_file)
    if base.resolve() == Path(config.out).resolve():
        raise UserError(f"out={config.out}: is the base itself. Give another folder")
    extra = load_encoder(base).vocab_size - old.vocab_size
    if extra > 0:
        raise UserError(
            f"base={base}: has {extra} added tokens behind the pieces of tokenizer.model; their ids would be given away. Use a base without added tokens"
        )
    if config.pieces:
        pieces = read_pieces(Path(config.pieces))
    else:
        pieces = learn_chinese_pieces(
            lambda: read_texts(config.corpus),
            num_pieces=config.num_pieces,
            max_piece_length=config.max_piece_length,
        )
    merged = merge(base_file.read_bytes(), pieces, cure=config.cure, vocab_multiple=config.vocab_multiple)
    added = merged.added + merged.filled
    dead = unreachable(merged.proto.SerializeToString(), added)

    report = {
        "vocab_size_before": merged.num_base,
        "vocab_size_after": len(merged.proto.pieces),
        "pieces_asked": len(pieces),
        "pieces_added": len(merged.added),
        "intermediates_added": merged.intermediates,
        "characters_filled_in": len(merged.filled),
        "dropped": merged.dropped,
        "unreachable": dead,
    }
    with write_aside(Path(config.out), marker="expansion.json") as out:
        write_tokenizer(merged.proto, out)
        if base.is_dir() and (base / "config.json").exists():
            from fireflyds.tokenizer.rows import expand_model, old_ids_of

            report |= expand_model(base, out, merged.num_base, old_ids_of(added, old), config.init, config.seed)
        if config.corpus:
            new = load_encoder(out)
            before, after = (measure(encoder, read_texts(config.corpus)) for encoder in (old, new))
            report |= {"before": before.as_dict(), "after": after.as_dict()}
            print(
                f"tokens per character: {before.tokens_per_character:.4f} -> {after.tokens_per_character:.4f} "
                f"({after.tokens / before.tokens - 1:+.2%})"
            )
        (out / "expansion.json").write_text(json.dumps(report, ensure_ascii=False, indent=2), encoding="utf-8")
    print(
        f"vocabulary: {merged.num_base:,} -> {len(merged.proto.pieces):,} pieces; of {len(pieces):,} candidates {len(merged.added) - len(merged.intermediates):,} were new "
        f"({len(merged.intermediates)} intermediates and {len(merged.filled)} characters added, "
        f"{len(merged.dropped)} dropped, {len(dead)} unreachable)"
    )
    if ties(merged.proto):
        print(TIES_NOTE)
    print(f"wrote {config.out}")


if __name__ == "__main__":
    app.main(expand, __doc__)
