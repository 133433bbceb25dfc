"""Learn a tokenizer from text alone, without a base: SentencePiece BPE with byte fallback, or byte-level BPE.

python launch/learn.py corpus=en.jsonl vocab_size=4096 out=tokenizer
python launch/learn.py corpus=en.jsonl kind=byte_level vocab_size=16000 out=tokenizer
"""

import json
from pathlib import Path

from sentencepiece import sentencepiece_model_pb2 as sp_pb2

from fireflyds import app
from fireflyds.config import LearnConfig, TokenizerKind
from fireflyds.data.read.sources import read_texts, size_of
from fireflyds.fs import Output, atomic_dir
from fireflyds.progress import counted
from fireflyds.tokenizer.hf_files import write_byte_level, write_tokenizer
from fireflyds.tokenizer.learn import learn_bpe, learn_byte_level


def learn(config: LearnConfig) -> None:
    """Learns a tokenizer from the corpus and writes its directory.

    Raises:
        UserError: the corpus cannot be read or has no text, or `vocab_size` is too small for its characters.
    """
    with atomic_dir(Path(config.out), Output("learn")) as out:
        texts = counted("learn", read_texts(config.corpus), size_of(config.corpus))
        options = {"vocab_size": config.vocab_size, "max_piece_length": config.max_piece_length}
        if config.kind is TokenizerKind.byte_level:
            document = learn_byte_level(texts, **options)
            write_byte_level(document, out)
            pieces = len(document["model"]["vocab"])
        else:
            proto = sp_pb2.ModelProto()
            proto.ParseFromString(learn_bpe(texts, **options))
            write_tokenizer(proto, out)
            pieces = len(proto.pieces)
        metadata = {"corpus": config.corpus, "kind": config.kind.name, "vocab_size": pieces}
        (out / "learn.json").write_text(json.dumps(metadata, ensure_ascii=False), encoding="utf-8")
    print(f"wrote {config.out}: {pieces:,} pieces")


if __name__ == "__main__":
    app.main(learn, __doc__)
