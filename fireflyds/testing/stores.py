"""Token stores made from examples, without text or a tokenizer."""

from pathlib import Path
from typing import Any, cast

from fireflyds.config import DataConfig, PrepareConfig, SourceConfig
from fireflyds.data.read.records import FilePart
from fireflyds.data.store.build import finish_store
from fireflyds.data.store.parts import EncodeTask
from fireflyds.data.store.store import PartWriter, TokenStore, token_dtype
from fireflyds.types import Encoder, Example


class _Encoder:
    """Only the members that finishing a store uses: token 7 ends a sentence."""

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def token(self, index: int) -> str:
        return "。" if index == 7 else "字"


def write_store(
    folder: Path, domains: dict[str, list[Example]], vocab_size: int = 100_000, tokenizer: str = "x"
) -> TokenStore:
    """Writes and opens a store whose documents are the examples, domain after domain.

    `tokenizer`: the fingerprint that the store records.
    """
    sources = [SourceConfig(path="x", domain=domain) for domain in domains]
    config = PrepareConfig(data=DataConfig(sources=sources), tokenizer="t", out=str(folder))
    tasks, infos = [], []
    for number, examples in enumerate(domains.values()):
        writer = PartWriter(folder / "parts", f"part{number}", token_dtype(vocab_size))
        for example in examples:
            writer.add(example)
        info: dict[str, Any] = {"key": f"part{number}", "counts": writer.counts(), "rejected": []}
        info |= {"unknown": 0, "left_out_thoughts": 0}
        info |= {name: {} for name in ("dropped", "formats", "unread", "markers")}
        writer.close(info)
        tasks.append(EncodeTask(number, FilePart("x"), 0, f"part{number}"))
        infos.append(info)
    finish_store(config, tasks, infos, cast(Encoder, _Encoder(vocab_size)), folder, {"tokenizer": tokenizer})
    return TokenStore(folder)
