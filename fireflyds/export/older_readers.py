"""Keys of `config.json` that programs built on transformers 4 read (vLLM's and TGI's builds), beside those of 5."""

from typing import Any

# Kinds of scaled rotary embeddings that transformers 4 had; later ones are for readers of `rope_parameters` alone.
_OLDER_KINDS = ("linear", "dynamic", "yarn", "longrope", "llama3")


def with_older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of a `config.json` with `rope_theta`, `rope_scaling` and `torch_dtype` as transformers 4
    has them, also in its `text_config`. Without `rope_theta` it takes 10,000 for every model."""
    older: dict[str, Any] = {}
    rope = config.get("rope_parameters") or {}
    kinds = {name: value for name, value in rope.items() if isinstance(value, dict)}
    if kinds:  # by kind of attention: Gemma 3
        rope = kinds.get("full_attention", next(iter(kinds.values())))
        if local := kinds.get("sliding_attention"):
            older["rope_local_base_freq"] = local.get("rope_theta")
    if rope:
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        older["rope_theta"] = rope.get("rope_theta")
        older["rope_scaling"] = scaling if scaling.get("rope_type") in _OLDER_KINDS else None
    if config.get("dtype"):
        older["torch_dtype"] = config["dtype"]
    if "text_config" in config:
        config = config | {"text_config": with_older_keys(config["text_config"])}
    return {name: value for name, value in older.items() if name not in config} | config
