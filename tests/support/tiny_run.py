"""The token store and the keys of a training of a tiny LLaMA from scratch, for tests that launch verbs."""

from collections.abc import Callable, Iterable
from pathlib import Path


def prepare_store(verb: Callable[..., object], folder: Path, tokenizer: Path, documents: Iterable[str]) -> None:
    """Prepares `documents` as `store` in `folder`, in which `verb` runs verbs."""
    (folder / "documents.txt").write_text("\n".join(documents), encoding="utf-8")
    verb("prepare", "data=documents.txt", f"tokenizer={tokenizer}", "out=store", "workers=1")


def tiny_keys(tokenizer: Path, layers: int = 2) -> list[str]:
    """The keys of the model and the data; the length of the run is left to the test."""
    sizes = f"hidden_size: 32, intermediate_size: 64, num_hidden_layers: {layers}, num_attention_heads: 2"
    return [
        "data=store",
        "model=at_path",
        "model.init=scratch",
        f"model.tokenizer={tokenizer}",
        f"model.architecture={{model_type: llama, {sizes}}}",
    ]


def short_run_keys(tokenizer: Path, steps: int, every: int) -> list[str]:
    """The keys of a run of `steps` optimizer steps with a checkpoint and a line in the log `every` so many."""
    return [
        *tiny_keys(tokenizer),
        f"optim.steps={steps}",
        "optim.lr=1e-3",
        "seq_len=256",
        "micro_batch_size=1",
        "global_batch_size=4",
        f"checkpoint.every={every}",
        f"log_every={every}",
    ]
