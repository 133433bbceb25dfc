"""Learn a tokenizer from text alone, with no base: SentencePiece BPE with byte fallback, in the LLaMA-2 style.

python launch/learn.py corpus=en.jsonl vocab_size=4096 out=tokenizer
"""

import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds import app
from fireflyds.config import LearnConfig
from fireflyds.data.sources import read_texts
from fireflyds.directories import write_aside
from fireflyds.tokenizer.directory import write_tokenizer
from fireflyds.tokenizer.learn import learn_bpe


def learn(config: LearnConfig) -> None:
    model = learn_bpe(read_texts(config.corpus), vocab_size=config.vocab_size, max_piece_length=config.max_piece_length)
    proto = sp_pb2.ModelProto()
    proto.ParseFromString(model)
    with write_aside(Path(config.out), marker="learn.json") as out:
        write_tokenizer(proto, out)
        about = {"corpus": config.corpus, "vocab_size": len(proto.pieces)}
        (out / "learn.json").write_text(json.dumps(about, ensure_ascii=False), encoding="utf-8")
    print(f"wrote {config.out}: {len(proto.pieces):,} pieces")


if __name__ == "__main__":
    app.main(learn, __doc__)
