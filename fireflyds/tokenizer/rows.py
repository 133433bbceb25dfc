"""Writes a Hugging Face model with new rows in its embeddings and output head, shard by shard."""

import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.tokenizer.hf_files import FILES
from fireflyds.tokenizer.row_init import NewRows
from fireflyds.tokenizer.shards import TensorEntry, save_streamed, shard_name
from fireflyds.tokenizer.weight_files import weight_readers

# Names of the two matrices: LLaMA and similar models, InternLM2, Falcon and Bloom, GPT-2, GPT-NeoX, Mamba.
EMBEDDINGS = (
    "embed_tokens.weight", "tok_embeddings.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight",
    "backbone.embeddings.weight",
)  # fmt: skip
HEADS = ("lm_head.weight", "lm_head.bias", "output.weight", "embed_out.weight")
# Of text models inside others, and of DeepSeek's layers that predict several tokens.
_INNER_HEADS = (".lm_head.weight", ".lm_head.bias", ".shared_head.head.weight")
# Gemma 3n and 4 add a second embedding in every layer.
_SECOND_TABLE = "embed_tokens_per_layer.weight"
# Published models pad their embeddings by a few hundred rows at most (Qwen2: 271).
MAX_PADDING = 1024
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")


def expand_model(base: Path, out: Path, new: NewRows) -> dict[str, Any]:
    """Copies a Hugging Face model directory and adds rows to its embeddings and head.

    Rows of the base beyond its tokens are padding and are replaced by the new rows. Weights are memory-mapped and
    written tensor by tensor, so that only the embeddings are held in memory; `.bin` shards become safetensors.

    Returns:
        `parameters_before`, `parameters_after`, `hidden_size` (width of a row), `matrices` (1 where tied, else 2) and
        `base_vocab_sizes` (the rows before every expansion of the model, this one last).

    Raises:
        UserError: there are no weights, fewer rows than tokens, no embeddings under a supported name, or a head that
            contradicts `tie_word_embeddings`.
    """
    config, tied = _read_config(base)
    text = text_part(config)
    rows = text["vocab_size"]
    check_model(base, new.num_tokens)
    tracker = _MatrixTracker(base, rows, tied)
    out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    files = weight_readers(base)
    for number, (name, read) in enumerate(files, 1):
        entries: dict[str, TensorEntry] = {}
        for key, tensor in read():
            grown, is_copy = tracker.check(key, tensor)
            if is_copy:  # tied models store one matrix
                continue
            shape = [new.num_tokens + len(new.old_ids), *tensor.shape[1:]] if grown else [*tensor.shape]
            read_rows = partial(new.grow, tensor, is_head=_is_head(key)) if grown else partial(_as_is, tensor)
            entries[key] = TensorEntry(shape, tensor.dtype, read_rows)
            tracker.after += math.prod(shape)
            total += math.prod(shape) * tensor.element_size()
        shard = name if name.endswith(".safetensors") else shard_name(number, len(files))
        save_streamed(out / shard, entries)
        weight_map |= dict.fromkeys(entries, shard)
    tracker.finish()
    _copy_other_files(base, out)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    text |= {"vocab_size": new.num_tokens + len(new.old_ids)}
    config["tie_word_embeddings"] = text["tie_word_embeddings"] = tied
    # Transformers preserves unknown keys; training reads the index of the first new row from this one, and those of
    # earlier expansions where their rows are to be trained too.
    sizes = text.get("base_vocab_sizes") or [text["base_vocab_size"]] if "base_vocab_size" in text else []
    text |= {"base_vocab_size": new.num_tokens, "base_vocab_sizes": [*sizes, new.num_tokens]}
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    return {
        "parameters_before": tracker.before,
        "parameters_after": tracker.after,
        "hidden_size": tracker.width,
        "matrices": 1 if tied else 2,
        "base_vocab_sizes": text["base_vocab_sizes"],
    }


def _as_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def _is_head(name: str) -> bool:
    return name in HEADS or name.endswith(_INNER_HEADS)


class _MatrixTracker:
    """Records the embedding and head matrices while a model's tensors are read, and checks that they are consistent."""

    def __init__(self, base: Path, rows: int, tied: bool) -> None:
        self.base = base
        self.rows = rows
        self.tied = tied
        self.embeddings: torch.Tensor | None = None
        self.head: torch.Tensor | None = None
        self.has_head = False
        self.before = self.after = self.width = 0

    def check(self, name: str, tensor: torch.Tensor) -> tuple[bool, bool]:
        """Records a tensor.

        Returns:
            Two flags: it has one row per token; it is the redundant head of a tied model.

        Raises:
            UserError: its number of rows differs from `vocab_size`.
        """
        is_embeddings, is_head = name.endswith(EMBEDDINGS), _is_head(name)
        if name.endswith(_SECOND_TABLE):
            raise UserError(
                f"{name} is a second table with a row of each token, which is not expanded",
                key="base",
                value=self.base,
                remedy="Give a model of another architecture",
            )
        if not (is_embeddings or is_head):
            self.before += tensor.numel()
            return False, False
        if tensor.shape[0] != self.rows:
            raise UserError(
                f"{name} has {tensor.shape[0]} rows but config.json has vocab_size={self.rows}",
                key="base",
                value=self.base,
                remedy="Correct config.json, or use a complete copy of the model",
            )
        if is_embeddings:
            self.embeddings, self.width = tensor, tensor.shape[1]
        elif tensor.dim() == 2:
            self.has_head = True
            if self.tied:
                self.head = tensor
                return True, True
        self.before += tensor.numel()
        return True, False

    def finish(self) -> None:
        """Checks the matrices after the last tensor.

        Raises:
            UserError: transformers would load the model with other weights than it was trained with.
        """
        if self.embeddings is None:
            raise UserError(
                f"no embeddings among its weights (a name ending in {', '.join(EMBEDDINGS)})",
                key="base",
                value=self.base,
                remedy="This architecture is not supported",
            )
        if self.head is not None and not torch.equal(self.head, self.embeddings):
            raise UserError(
                "tie_word_embeddings is true, but the head's weights differ from the embeddings",
                key="base",
                value=self.base,
                remedy="Set it to false in config.json if the head is in use, or remove the head if it is not",
            )
        if not (self.tied or self.has_head):
            raise UserError(
                f"tie_word_embeddings is false, but there is no head ({', '.join(HEADS)})",
                key="base",
                value=self.base,
                remedy="Set it to true in config.json if the head shares the embeddings",
            )


def _read_config(base: Path) -> tuple[dict[str, Any], bool]:
    """Returns the contents of `config.json`, and True where the head is tied to the embeddings."""
    config = read_json(base / "config.json")
    text = text_part(config)
    if "vocab_size" not in text:
        raise UserError(
            "config.json has no vocab_size",
            key="base",
            value=base,
            remedy="Convert an original checkpoint with launch/convert.py, or add the key",
        )
    if (tied := ties_embeddings(base, config)) is not None:
        return config, tied
    from transformers import AutoConfig

    try:  # each architecture has its own default
        return config, bool(AutoConfig.from_pretrained(base).tie_word_embeddings)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            "config.json has no tie_word_embeddings, and transformers has no default for its model type "
            f"({str(error).splitlines()[0]})",
            key="base",
            value=base,
            remedy="Add the key",
        ) from error


def text_part(config: dict[str, Any]) -> dict[str, Any]:
    """The part of the contents of `config.json` that describes the text model: all of it but in wrappers."""
    part: dict[str, Any] = config.get("text_config") or config
    return part


def ties_embeddings(base: Path, config: dict[str, Any]) -> bool | None:
    """True where the head of a model is its embeddings; None where neither its `config.json` nor its files say so.

    Wrappers that do not say so have a head of their own if it is among their weights: transformers' defaults for the
    wrapper and for its text model may differ.
    """
    text = text_part(config)
    for part in (config, text):
        if part.get("tie_word_embeddings") is not None:
            return bool(part["tie_word_embeddings"])
    if text is config:
        return None
    return not any(_is_head(name) for _, read in weight_readers(base) for name, _ in read())


def check_model(base: Path, num_tokens: int) -> None:
    """Checks, before pieces are learned, that rows can be added to a model.

    Raises:
        UserError: there are no weights, fewer rows than tokens, or special tokens that the tokenizer does not have.
    """
    config, _ = _read_config(base)
    text = text_part(config)
    if text["vocab_size"] < num_tokens:
        raise UserError(
            f"config.json has vocab_size={text['vocab_size']}, fewer than the tokenizer's {num_tokens} tokens",
            key="base",
            value=base,
            remedy="Give the tokenizer and the weights of the same model",
        )
    for file in (base / "config.json", base / "generation_config.json"):
        settings = read_json(file) if file.is_file() else {}
        ids = [item for part in (settings, settings.get("text_config") or {}) for item in part.items()]
        for name, value in ids:
            if not name.endswith(("_token_id", "_token_index")):
                continue
            for index in value if isinstance(value, list) else [value]:
                if isinstance(index, int) and index >= num_tokens:
                    raise UserError(
                        f"{name} is {index}, but the tokenizer has no such token (it has {num_tokens}); a new piece "
                        "would get this id",
                        key=file,
                        remedy="Correct the file, or add the token to the tokenizer",
                    )
    for _, read in weight_readers(base):
        next(read(), None)


def _copy_other_files(base: Path, out: Path) -> None:
    """Copies all files except the weights, their index and the tokenizer."""
    for file in base.iterdir():
        if file.is_file() and file.suffix not in _WEIGHTS and file.name not in FILES and ".index.json" not in file.name:
            shutil.copy2(file, out / file.name)
