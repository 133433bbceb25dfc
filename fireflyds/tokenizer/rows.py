"""New embedding and head rows for new pieces, written shard by shard beside the rest of the model."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fireflyds.config import RowInit
from fireflyds.errors import UserError
from fireflyds.tokenizer.directory import FILES

EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def old_ids_of(pieces: Sequence[str], old: Any) -> list[list[int]]:
    """The base's ids of each new piece's text alone: without BOS and without the dummy prefix."""
    return [old.encode(piece.replace("▁", " "), continues=True) for piece in pieces]


def new_rows(weight: torch.Tensor, old_ids: list[list[int]], init: RowInit, seed: int) -> torch.Tensor:
    """`[len(old_ids), D]` rows for `weight` `[V, D]`, in its dtype.

    `mean`: the mean of the piece's old rows, computed in float32 (Linly and Ziya initialise so; the published
    script of HIT lets `<s>` and `▁` into every mean, which `old_ids_of` keeps out). `random`: a normal with
    the old rows' mean and standard deviation per column.
    """
    values = weight.float()
    if init is RowInit.random:
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(len(old_ids), values.shape[1], generator=generator)
        return (values.mean(0) + noise * values.std(0)).to(weight.dtype)
    return torch.stack([values[ids].mean(0) for ids in old_ids]).to(weight.dtype)


def expand_model(
    base: Path, out: Path, num_pieces: int, old_ids: list[list[int]], init: RowInit, seed: int
) -> dict[str, int]:
    """Copy a Hugging Face directory with rows for `len(old_ids)` new pieces, which follow the `num_pieces` old ones.

    Rows beyond the old pieces are padding, which the new rows take the place of.

    Only one shard is in memory at a time. Returns the parameter counts before and after.

    Raises:
        UserError: no safetensors weights, fewer rows than pieces, no embeddings under the expected name, or their
            number of rows is not `vocab_size`.
    """
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    shards = sorted(base.glob("*.safetensors"))
    if not shards:
        raise UserError(f"base={base}: no *.safetensors weights there. Save the model with safetensors first")
    if config["vocab_size"] < num_pieces:
        raise UserError(
            f"base={base}: config.json says vocab_size={config['vocab_size']}, fewer than the tokenizer's {num_pieces} pieces. The two do not belong together"
        )
    out.mkdir(parents=True, exist_ok=True)
    grown, before, after = [], 0, 0
    for shard in shards:
        tensors = {}
        with safe_open(shard, "pt") as file:
            metadata = file.metadata()
            for name in file.keys():  # noqa: SIM118 - not a dict
                tensor = file.get_tensor(name)
                before += tensor.numel()
                if name in (EMBEDDINGS, HEAD):
                    tensor = _grow(base, name, tensor, config["vocab_size"], num_pieces, old_ids, init, seed)
                    grown.append(name)
                after += tensor.numel()
                tensors[name] = tensor.contiguous()
        save_file(tensors, out / shard.name, metadata=metadata)
    if EMBEDDINGS not in grown:
        raise UserError(f"base={base}: no tensor {EMBEDDINGS} in its weights; this layout is not known")
    _copy_rest(base, out, config | {"vocab_size": num_pieces + len(old_ids)})
    return {"parameters_before": before, "parameters_after": after}


def _grow(
    base: Path,
    name: str,
    weight: torch.Tensor,
    vocab_size: int,
    num_pieces: int,
    old_ids: list[list[int]],
    init: RowInit,
    seed: int,
) -> torch.Tensor:
    if weight.shape[0] != vocab_size:
        raise UserError(f"base={base}: {name} has {weight.shape[0]} rows but config.json says vocab_size={vocab_size}")
    old = weight[:num_pieces]
    return torch.cat([old, new_rows(old, old_ids, init, seed)])


def _copy_rest(base: Path, out: Path, config: dict[str, Any]) -> None:
    """Everything but weights and tokenizer; the sizes in `config.json` and the index follow the new rows."""
    for file in base.iterdir():
        if file.is_file() and file.suffix not in (".safetensors", ".bin", ".pt") and file.name not in FILES:
            shutil.copy2(file, out / file.name)
    (out / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False), encoding="utf-8")
    index = out / "model.safetensors.index.json"
    if index.exists():
        document = json.loads(index.read_text(encoding="utf-8"))
        document["metadata"]["total_size"] = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        index.write_text(json.dumps(document, indent=2), encoding="utf-8")
