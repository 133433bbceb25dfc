"""New embedding and head rows for new pieces, written shard by shard beside the rest of the model."""

import json
import math
import pickle
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from fireflyds.config import RowInit
from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.tokenizer.hf_files import FILES
from fireflyds.tokenizer.shards import Entry, save_streamed, shard_name, shard_names

# The names transformers gives the two matrices: LLaMA's kind, InternLM2, Falcon and Bloom, GPT-2, GPT-NeoX.
EMBEDDINGS = ("embed_tokens.weight", "tok_embeddings.weight", "word_embeddings.weight", "wte.weight", "embed_in.weight")
HEADS = ("lm_head.weight", "lm_head.bias", "output.weight", "embed_out.weight")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth")
# Smooth inverse frequency (Arora et al. 2017, "A simple but tough-to-beat baseline for sentence embeddings").
_SIF = 1e-3


@dataclass(frozen=True, slots=True)
class NewRows:
    """How rows for new pieces are made: row i follows the base's `num_tokens` rows and stands for `old_ids[i]`.

    `frequency`, `[num_tokens]`: the share of each old token in text, for `weighted`.
    """

    num_tokens: int
    old_ids: Sequence[Sequence[int]]
    init: RowInit
    seed: int
    frequency: np.ndarray | None = None

    def make(self, weight: torch.Tensor) -> torch.Tensor:
        """`[len(old_ids), D]` rows for `weight` `[V, D]` (or `[len(old_ids)]` for a bias `[V]`), in its dtype.

        `mean`: the mean of the piece's old rows (Linly and Ziya initialise so; the published script of HIT lets `<s>`
        and `▁` into every mean, which `old_ids` keeps out). `weighted`: the same with weights a / (a + p), p being
        the token's share of the text, so that byte tokens that half the text is made of count less. `random`: a
        normal with the old rows' mean and covariance. All are computed in float32.
        """
        old = weight[: self.num_tokens]
        if self.init is RowInit.random:
            return _normal_like(old, len(self.old_ids), self.seed).to(weight.dtype)
        return torch.stack([self._mean(old, list(ids)) for ids in self.old_ids]).to(weight.dtype)

    def grow(self, weight: torch.Tensor) -> torch.Tensor:
        """The rows of the base's tokens and the new ones: `[num_tokens + len(old_ids), ...]`."""
        return torch.cat([weight[: self.num_tokens], self.make(weight)])

    def _mean(self, old: torch.Tensor, ids: list[int]) -> torch.Tensor:
        rows = old[ids].float()
        if self.init is RowInit.mean or self.frequency is None:
            return rows.mean(0)
        weights = torch.from_numpy(_SIF / (_SIF + self.frequency[ids])).float()
        return torch.tensordot(weights / weights.sum(), rows, dims=1)


def _normal_like(old: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    """`count` draws from the normal with the mean and the covariance of the rows of `old`."""
    generator = torch.Generator().manual_seed(seed)
    columns = old if old.dim() == 2 else old[:, None]
    width = columns.shape[1]
    mean = columns.float().mean(0)
    covariance = torch.zeros(width, width)
    for chunk in columns.split(8192):
        centred = chunk.float() - mean
        covariance += centred.T @ centred
    covariance /= len(columns)
    # Fewer rows than columns leave the covariance without full rank; the jitter is far below its spread.
    jitter = 1e-6 * covariance.diagonal().mean() + 1e-30
    root = torch.linalg.cholesky(covariance + jitter * torch.eye(width))
    drawn = mean + torch.randn(count, width, generator=generator) @ root.T
    return drawn if old.dim() == 2 else drawn[:, 0]


def expand_model(base: Path, out: Path, new: NewRows) -> dict[str, int]:
    """Copy a Hugging Face directory with new rows.

    Rows of the base beyond its tokens are padding, which the new rows take the place of. Weights are mapped and written
    tensor by tensor, so that the embeddings alone are in memory; `.bin` shards become safetensors. Returns the parameter counts before and after, and the row width.

    Raises:
        UserError: no weights, fewer rows than tokens, no embeddings under a known name, or a head that contradicts
            `tie_word_embeddings`.
    """
    config, tied = _read_config(base)
    rows = config["vocab_size"]
    check_model(base, new.num_tokens)
    seen = _Seen(base, rows, tied)
    out.mkdir(parents=True, exist_ok=True)
    weight_map: dict[str, str] = {}
    total = 0
    files = _shards(base)
    for number, (name, read) in enumerate(files, 1):
        entries: dict[str, Entry] = {}
        for key, tensor in read():
            grown, is_copy = seen.check(key, tensor)
            if is_copy:  # tied models keep one matrix
                continue
            shape = [new.num_tokens + len(new.old_ids), *tensor.shape[1:]] if grown else [*tensor.shape]
            entries[key] = Entry(shape, tensor.dtype, partial(new.grow, tensor) if grown else partial(_itself, tensor))
            seen.after += math.prod(shape)
            total += math.prod(shape) * tensor.element_size()
        written = name if name.endswith(".safetensors") else shard_name(number, len(files))
        save_streamed(out / written, entries)
        weight_map |= dict.fromkeys(entries, written)
    seen.finish()
    _copy_rest(base, out)
    if len(files) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (out / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config |= {"vocab_size": new.num_tokens + len(new.old_ids), "tie_word_embeddings": tied}
    # Transformers carries what it does not know along, so whoever trains the model finds where its new rows begin.
    config["base_vocab_size"] = new.num_tokens
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    return {
        "parameters_before": seen.before,
        "parameters_after": seen.after,
        "hidden_size": seen.width,
        "matrices": 1 if tied else 2,
    }


def _itself(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


class _Seen:
    """What has passed by of a model's weights: the two matrices, and whether they are one."""

    def __init__(self, base: Path, rows: int, tied: bool) -> None:
        self.base = base
        self.rows = rows
        self.tied = tied
        self.embeddings: torch.Tensor | None = None
        self.head: torch.Tensor | None = None
        self.has_head = False
        self.before = self.after = self.width = 0

    def check(self, name: str, tensor: torch.Tensor) -> tuple[bool, bool]:
        """Note a tensor: whether it has one row for each token, and whether it is the tied head's copy."""
        is_embeddings, is_head = name.endswith(EMBEDDINGS), name in HEADS
        if not (is_embeddings or is_head):
            self.before += tensor.numel()
            return False, False
        if tensor.shape[0] != self.rows:
            raise UserError(
                f"base={self.base}: {name} has {tensor.shape[0]} rows but config.json says vocab_size={self.rows}. "
                "Correct config.json, or use a whole copy of the model"
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
        """Refuse what would not load as it trained."""
        if self.embeddings is None:
            raise UserError(
                f"base={self.base}: no embeddings among its weights (a name ending in {', '.join(EMBEDDINGS)}). "
                "This layout is not known"
            )
        if self.head is not None and not torch.equal(self.head, self.embeddings):
            raise UserError(
                f"base={self.base}: tie_word_embeddings is true, but the head's weights differ from the embeddings. "
                "Set it to false in config.json if the head is real, or remove the head if it is not"
            )
        if not (self.tied or self.has_head):
            raise UserError(
                f"base={self.base}: tie_word_embeddings is false, but there is no head ({', '.join(HEADS)}). "
                "Set it to true in config.json if the head is the embeddings"
            )


def _read_config(base: Path) -> tuple[dict[str, Any], bool]:
    """`config.json`, and whether the head is the embeddings."""
    config = read_json(base / "config.json")
    if "vocab_size" not in config:
        raise UserError(f"base={base}: config.json has no vocab_size at its top. Give the language model alone")
    if "tie_word_embeddings" in config:
        return config, bool(config["tie_word_embeddings"])
    from transformers import AutoConfig

    try:  # each architecture has its own default
        return config, bool(AutoConfig.from_pretrained(base).tie_word_embeddings)
    except (ValueError, KeyError, OSError) as error:
        raise UserError(
            f"base={base}: config.json does not say tie_word_embeddings, and its model type is not known here "
            f"({str(error).splitlines()[0]}). Add the key"
        ) from error


def check_model(base: Path, num_tokens: int) -> None:
    """Refuse, before anything is learnt, a model that could not be given rows.

    Raises:
        UserError: no weights, fewer rows than tokens, or special tokens that the tokenizer does not have.
    """
    config, _ = _read_config(base)
    if config["vocab_size"] < num_tokens:
        raise UserError(
            f"base={base}: config.json says vocab_size={config['vocab_size']}, fewer than the tokenizer's {num_tokens} "
            "tokens. The two do not belong together"
        )
    for file in (base / "config.json", base / "generation_config.json"):
        settings = read_json(file) if file.is_file() else {}
        for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
            value = settings.get(name)
            for index in value if isinstance(value, list) else [value]:
                if isinstance(index, int) and index >= num_tokens:
                    raise UserError(
                        f"{file}: {name} is {index}, but the tokenizer has no such token (it has {num_tokens}); a new piece "
                        "would take its place. Correct the file, or add the token to the tokenizer"
                    )
    for _, read in _shards(base):
        next(read(), None)


Reader = Callable[[], Iterator[tuple[str, torch.Tensor]]]


def _shards(base: Path) -> list[tuple[str, Reader]]:
    """Weight files with a reader each: those of the index, safetensors before PyTorch's own."""
    for stem, suffix, read in (("model", ".safetensors", _read_safetensors), ("pytorch_model", ".bin", _read_pytorch)):
        index = base / f"{stem}{suffix}.index.json"
        if index.is_file():
            names = shard_names(index)
        else:
            whole = f"{stem}{suffix}"
            names = [whole] if (base / whole).is_file() else sorted(file.name for file in base.glob(f"{stem}*{suffix}"))
        missing = [name for name in names if not (base / name).is_file()]
        if missing:
            raise UserError(f"base={base}: {missing[0]} is missing, which {index.name} names. Get the file again")
        if names:
            return [(name, partial(_readable, read, base / name)) for name in names]
    raise UserError(
        f"base={base}: no weights there (model*.safetensors or pytorch_model*.bin). "
        "Give a whole model, or its tokenizer alone (without config.json)"
    )


def _readable(
    read: Callable[[Path], Iterator[tuple[str, torch.Tensor]]], file: Path
) -> Iterator[tuple[str, torch.Tensor]]:
    try:
        yield from read(file)
    except (OSError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        raise UserError(f"{file}: cannot be read ({str(error).splitlines()[0]}). Get the file again") from error


def _read_safetensors(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    with safe_open(file, "pt") as opened:
        for name in opened.keys():  # noqa: SIM118 - not a dict
            yield name, opened.get_tensor(name)


def _read_pytorch(file: Path) -> Iterator[tuple[str, torch.Tensor]]:
    # Mapped, not read: a tensor is in memory when it is used. Files of before 2020 cannot be mapped.
    mapped = zipfile.is_zipfile(file)
    yield from torch.load(file, map_location="cpu", mmap=mapped, weights_only=True).items()


def _copy_rest(base: Path, out: Path) -> None:
    """Everything but weights, their index and the tokenizer."""
    for file in base.iterdir():
        if file.is_file() and file.suffix not in _WEIGHTS and file.name not in FILES and ".index.json" not in file.name:
            shutil.copy2(file, out / file.name)
