"""Tokenizer settings and added tokens of a Hugging Face directory."""

from pathlib import Path
from typing import Any

from fireflyds.fs import read_json

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
# Keys that apply only to the tokenizer class that wrote the file.
_CLASS_SPECIFIC = {
    "tokenizer_class",
    "auto_map",
    "added_tokens_decoder",
    "legacy",
    "sp_model_kwargs",
    "backend",
    "is_local",
}
FLAGS = ("single_word", "lstrip", "rstrip", "normalized")


def settings_of(folder: Path | None) -> dict[str, Any]:
    """Returns `tokenizer_config.json` merged with `special_tokens_map.json`, without class-specific keys and nulls."""
    if folder is None:
        return {}
    settings = raw_settings(folder)
    if str(settings.get("tokenizer_class", "")).startswith("Llama"):
        settings.setdefault("padding_side", "left")  # default of this class
    document = _read(folder / "tokenizer.json")
    if document and not document.get("post_processor"):
        settings.setdefault("add_bos_token", False)
    return {key: value for key, value in settings.items() if key not in _CLASS_SPECIFIC and value is not None}


def raw_settings(folder: Path) -> dict[str, Any]:
    """Returns `tokenizer_config.json` merged with `special_tokens_map.json` as they are, nulls included."""
    return _read(folder / "special_tokens_map.json") | _read(folder / "tokenizer_config.json")


def chat_template(folder: Path) -> str | None:
    """Returns the chat template of a directory: `chat_template.jinja`, else that of `tokenizer_config.json`, where it
    may be a list of named ones, of which `default` counts."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = raw_settings(folder).get("chat_template")
    if isinstance(template, list):
        named = {row.get("name"): row.get("template") for row in template if isinstance(row, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def prefixes_after_special(folder: Path) -> bool:
    """True where text right after a special token gets the dummy prefix: as `tokenizer.json` says, else `legacy` of
    LLaMA's tokenizer (transformers#24565)."""
    document = _read(folder / "tokenizer.json")
    if not document:
        return raw_settings(folder).get("legacy") is not False
    parts = [
        step
        for name in ("normalizer", "pre_tokenizer")
        for part in [document.get(name) or {}]
        for step in (part, *part.get("normalizers", []), *part.get("pretokenizers", []))
    ]
    return any(step.get("type") == "Prepend" or step.get("prepend_scheme") == "always" for step in parts)


def without_limits(document: dict[str, Any]) -> dict[str, Any]:
    """Returns the contents of a `tokenizer.json` without truncation, padding and dropout of its own: they would cut
    text, or encode it differently each time."""
    model = document["model"]
    if model.get("dropout"):
        model = model | {"dropout": None}
    return document | {"truncation": None, "padding": None, "model": model}


def with_bos(document: dict[str, Any], bos: str, index: int) -> dict[str, Any]:
    """Returns the contents of a `tokenizer.json` with a post-processor that puts BOS before text, after its own."""
    token = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": type_id}} for name, type_id in (("A", 0), ("B", 1)))
    template = {
        "type": "TemplateProcessing",
        "single": [token, first],
        "pair": [token, first, token, second],
        "special_tokens": {bos: {"id": bos, "ids": [index], "tokens": [bos]}},
    }
    own = document.get("post_processor")
    if bos in str(own):  # it adds BOS itself
        return document
    processors = [*(own["processors"] if own and own["type"] == "Sequence" else [own] if own else []), template]
    return document | {"post_processor": {"type": "Sequence", "processors": processors}}


def adds_bos(folder: Path) -> bool:
    """True where the tokenizer of a SentencePiece directory adds BOS: `add_bos_token`, by default true as in LLaMA."""
    return bool(settings_of(folder).get("add_bos_token", True))


def added_tokens(folder: Path) -> list[dict[str, Any]]:
    """Returns the added tokens of a directory, ordered by id, each with `content`, `id`, `special` and FLAGS.

    Sources, in increasing priority: `added_tokens.json`, `added_tokens_decoder` of `tokenizer_config.json`,
    `added_tokens` of `tokenizer.json`.
    """
    defaults = {"special": True, **dict.fromkeys(FLAGS, False)}
    tokens_by_id: dict[int, dict[str, Any]] = {}
    for content, index in _read(folder / "added_tokens.json").items():
        tokens_by_id[index] = defaults | {"content": content, "id": index}
    for index, row in _read(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        tokens_by_id[int(index)] = defaults | row | {"id": int(index)}
    for row in _read(folder / "tokenizer.json").get("added_tokens", []):
        tokens_by_id[row["id"]] = defaults | row
    return [tokens_by_id[index] for index in sorted(tokens_by_id)]


def content(token: Any) -> str | None:
    """Returns the text of a token in the settings, which is a string or an object with flags; None if there is none."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
