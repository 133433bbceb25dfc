"""What a Hugging Face directory says of its tokenizer beside the pieces: settings, and tokens added behind them."""

from pathlib import Path
from typing import Any

from fireflyds.fs import read_json

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
# What belongs to the class that a file was written for.
_OF_THE_CLASS = {
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
    """`tokenizer_config.json` and `special_tokens_map.json` of a directory, without what belongs to a class."""
    if folder is None:
        return {}
    settings = _read(folder / "special_tokens_map.json") | _read(folder / "tokenizer_config.json")
    if str(settings.get("tokenizer_class", "")).startswith("Llama"):
        settings.setdefault("padding_side", "left")  # that class's default
    document = _read(folder / "tokenizer.json")
    if document and not document.get("post_processor"):
        settings.setdefault("add_bos_token", False)
    return {key: value for key, value in settings.items() if key not in _OF_THE_CLASS and value is not None}


def adds_bos(folder: Path) -> bool:
    """Whether the tokenizer of a SentencePiece directory begins with BOS: LLaMA's do unless their settings say not."""
    return bool(settings_of(folder).get("add_bos_token", True))


def added_tokens(folder: Path) -> list[dict[str, Any]]:
    """Tokens that a directory adds to its pieces, by id: `content`, `id`, `special` and FLAGS of each.

    They stand in `tokenizer.json`, in `added_tokens_decoder` of `tokenizer_config.json`, or in `added_tokens.json`.
    """
    defaults = {"special": True, **dict.fromkeys(FLAGS, False)}
    found: dict[int, dict[str, Any]] = {}
    for content, index in _read(folder / "added_tokens.json").items():
        found[index] = defaults | {"content": content, "id": index}
    for index, row in _read(folder / "tokenizer_config.json").get("added_tokens_decoder", {}).items():
        found[int(index)] = defaults | row | {"id": int(index)}
    for row in _read(folder / "tokenizer.json").get("added_tokens", []):
        found[row["id"]] = defaults | row
    return [found[index] for index in sorted(found)]


def content(token: Any) -> str | None:
    """A token as settings name it: a string, or an object with its flags."""
    found = token.get("content") if isinstance(token, dict) else token
    return found if isinstance(found, str) else None


def _read(file: Path) -> dict[str, Any]:
    return read_json(file) if file.is_file() else {}
