"""Meta's own files of LLaMA 1, 2 and 3 (`params.json`, `consolidated.*.pth`) as transformers' LLaMA.

Every file holds a part of each matrix for one rank of tensor parallelism (arXiv 1909.08053): rows of what comes first,
columns of what comes behind. Rotary pairs are neighbours there, and halves of a head in transformers.
"""

import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.models.convert.fields import is_computed, rotary
from fireflyds.tokenizer.shards import TensorEntry

PARAMS = "params.json"
TEMPLATES = ("llama2", "llama3")
_NAMES = {
    "tok_embeddings.": "model.embed_tokens.", "norm.": "model.norm.", "output.": "lm_head.", "layers.": "model.layers.",
    "attention.wq": "self_attn.q_proj", "attention.wk": "self_attn.k_proj", "attention.wv": "self_attn.v_proj",
    "attention.wo": "self_attn.o_proj", "feed_forward.w1": "mlp.gate_proj", "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj", "attention_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}  # fmt: skip
_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")


def read(folder: Path) -> tuple[dict[str, Any], dict[str, TensorEntry]]:
    """Returns `config.json` and the weights of transformers' LLaMA, read when they are written.

    Raises:
        UserError: there are no weights, the parts do not fit together, or `params.json` does not say enough.
    """
    params = read_json(folder / PARAMS)
    files = sorted(folder.glob("consolidated.*.pth"))
    if not files:
        raise UserError("no consolidated.*.pth there", key="model", value=folder, remedy="Give a complete model")
    shards = [torch.load(file, map_location="cpu", mmap=True, weights_only=True) for file in files]
    entries = {}
    for name in shards[0]:
        if is_computed(name):
            continue
        parts = [shard[name] for shard in shards]
        make = partial(_weight, name, params, parts)
        shape = _weight(name, params, [part.to("meta") for part in parts]).shape
        entries[_renamed(name)] = TensorEntry([*shape], parts[0].dtype, make)
    return _config(folder, params, entries), entries


def _renamed(name: str) -> str:
    for theirs, ours in _NAMES.items():
        name = re.sub(rf"(^|\.){re.escape(theirs)}", rf"\g<1>{ours}", name)
    return name


def _weight(name: str, params: dict[str, Any], parts: list[Tensor]) -> Tensor:
    """One weight of all parts, with the rows of queries and keys in transformers' order."""
    if parts[0].dim() == 1:
        return parts[0]
    by_columns = name.endswith(_BY_COLUMNS) or ("tok_embeddings" in name and parts[0].shape[1] < params["dim"])
    whole = torch.cat(parts, dim=int(by_columns))
    if ".attention.wq." not in name and ".attention.wk." not in name:
        return whole
    head_dim = params["dim"] // params["n_heads"]
    return whole.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _config(folder: Path, params: dict[str, Any], entries: dict[str, TensorEntry]) -> dict[str, Any]:
    heads = params["n_heads"]
    theta, scaled = params.get("rope_theta", 10_000.0), params.get("use_scaled_rope", False)
    scaling = _scaling(folder, params) if scaled else None
    keys = entries["model.layers.0.self_attn.k_proj.weight"].shape[0] // (params["dim"] // heads)
    if keys != params.get("n_kv_heads", heads):
        raise UserError(
            f"its files have {keys} key heads together, and {PARAMS} says {params.get('n_kv_heads', heads)}",
            key="model",
            value=folder,
            remedy="Give all its files, of the sizes whose parts hold different heads",
        )
    # Neither generation says how long its documents were; LLaMA 1 and 2 differ in the epsilon of their norms.
    third, first = theta >= 500_000, params["norm_eps"] == 1e-6
    positions = 131_072 if scaled else 8_192 if third else 2_048 if first else 4_096
    vocab_size = entries["model.embed_tokens.weight"].shape[0]
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": vocab_size,
        "hidden_size": params["dim"], "num_hidden_layers": params["n_layers"], "num_attention_heads": heads,
        "intermediate_size": entries["model.layers.0.mlp.gate_proj.weight"].shape[0], "num_key_value_heads": keys,
        "rms_norm_eps": params["norm_eps"], "max_position_embeddings": positions, "tie_word_embeddings": False,
        "bos_token_id": 1 if vocab_size <= 32_016 else 128_000, "eos_token_id": 2 if vocab_size <= 32_016 else 128_001,
        **rotary(theta, scaling),
    }  # fmt: skip


def _scaling(folder: Path, params: dict[str, Any]) -> dict[str, Any]:
    """Llama 3.1's scaling (arXiv 2407.21783); the small models of 3.2 have another factor."""
    factor = params.get("rope_scaling_factor")
    if factor is None and params["dim"] < 4_096:
        raise UserError(
            f"{PARAMS} has use_scaled_rope but no rope_scaling_factor, which is 32 for Llama 3.2",
            key="model",
            value=folder,
            remedy=f"Add it to {PARAMS}",
        )
    return {
        "rope_type": "llama3", "factor": float(factor or 8), "low_freq_factor": 1.0,
        "high_freq_factor": float(params.get("rope_high_freq_factor") or 4),
        "original_max_position_embeddings": 8_192,
    }  # fmt: skip
