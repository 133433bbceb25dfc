"""Keys of `config.json` that programs built on transformers 4 read (vLLM's and TGI's builds), beside those of 5."""

from typing import Any

# Kinds of rotary embeddings that transformers 4 had; a model with a later one has no keys of these.
_OLDER_KINDS = ("default", "linear", "dynamic", "yarn", "longrope", "llama3")


def with_older_keys(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of a `config.json` with `rope_theta`, `rope_scaling` and `torch_dtype` as transformers 4
    has them, also in its `text_config`. Without `rope_theta` it takes 10,000 for every model."""
    older: dict[str, Any] = {}
    rope = config.get("rope_parameters") or {}
    kinds = {name: value for name, value in rope.items() if isinstance(value, dict)}
    if kinds:  # by kind of attention: Gemma 3
        rope = kinds.get("full_attention", next(iter(kinds.values())))
    if rope and rope.get("rope_type", "default") in _OLDER_KINDS:
        if local := kinds.get("sliding_attention"):
            older["rope_local_base_freq"] = local.get("rope_theta")
        scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
        older["rope_theta"] = rope.get("rope_theta")
        older["rope_scaling"] = None if scaling.get("rope_type", "default") == "default" else scaling
    if config.get("dtype"):
        older["torch_dtype"] = config["dtype"]
    if "text_config" in config:
        config = config | {"text_config": with_older_keys(config["text_config"])}
    return {name: value for name, value in older.items() if name not in config} | config
