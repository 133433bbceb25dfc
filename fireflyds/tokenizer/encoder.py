"""One interface over SentencePiece `.model` files and `tokenizer.json`, the two ways a tokenizer is kept."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import sentencepiece

from fireflyds.errors import UserError
from fireflyds.types import Encoder


class SentencePieceEncoder:
    """Encodes with SentencePiece itself: what transformers derives from a `.model` may break ties differently."""

    def __init__(self, path: Path, added_tokens: dict[str, int]) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_file=str(path))
        self._added = {token: index for token, index in added_tokens.items() if index >= self._model.get_piece_size()}
        self.vocab_size: int = max([self._model.get_piece_size(), *(index + 1 for index in self._added.values())])
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.eos_id = self._model.eos_id() if self._model.eos_id() >= 0 else None
        # A newline is a byte piece everywhere, so text after it is encoded without the dummy prefix.
        self._newline: list[int] = self._model.encode("\n")

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        if not text:
            return []
        if continues:
            return list(self._model.encode("\n" + text)[len(self._newline) :])
        return list(self._model.encode(text))

    def token_id(self, token: str) -> int | None:
        if token in self._added:
            return self._added[token]
        index = int(self._model.piece_to_id(token))
        return None if index == self._model.unk_id() else index

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode([index for index in ids if index < self._model.get_piece_size()]))

    def fingerprint(self) -> str:
        return hashlib.sha256(self._model.serialized_model_proto()).hexdigest()


class FastEncoder:
    """Encodes with `tokenizers`, for directories that have only a `tokenizer.json`."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer
        from transformers import AutoTokenizer

        self._model = Tokenizer.from_file(str(folder / "tokenizer.json"))
        # Text that spells a special token is text.
        self._model.encode_special_tokens = True
        self._has_dummy_prefix = self._model.encode("a", add_special_tokens=False).tokens[0].startswith("▁")
        names: Any = AutoTokenizer.from_pretrained(folder)
        self.vocab_size = self._model.get_vocab_size()
        self.bos_id: int | None = names.bos_token_id
        self.eos_id: int | None = names.eos_token_id

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        if continues and self._has_dummy_prefix:
            newline = self._model.encode("\n", add_special_tokens=False).ids
            return list(self._model.encode("\n" + text, add_special_tokens=False).ids[len(newline) :])
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def token_id(self, token: str) -> int | None:
        index = self._model.token_to_id(token)
        return None if index is None else int(index)

    def decode(self, ids: Sequence[int]) -> str:
        return str(self._model.decode(list(ids), skip_special_tokens=True))

    def fingerprint(self) -> str:
        return hashlib.sha256(self._model.to_str().encode()).hexdigest()


def model_file(path: str | Path) -> Path | None:
    """The SentencePiece file at `path` (a `.model`, or a directory with `tokenizer.model`), if there is one."""
    path = Path(path)
    file = path / "tokenizer.model" if path.is_dir() else path
    return file if file.suffix == ".model" and file.is_file() else None


def _added_tokens(folder: Path) -> dict[str, int]:
    """Tokens that a Hugging Face directory adds to the pieces of its `tokenizer.model`."""
    if (folder / "tokenizer.json").is_file():
        rows = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8")).get("added_tokens", [])
        return {row["content"]: row["id"] for row in rows}
    if (folder / "added_tokens.json").is_file():
        return dict(json.loads((folder / "added_tokens.json").read_text(encoding="utf-8")))
    return {}


def load_encoder(path: str | Path) -> Encoder:
    """The encoder of a `.model` file or of a Hugging Face directory.

    Raises:
        UserError: nothing there, or nothing that is a tokenizer.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"tokenizer {path}: no such file or directory. Give a Hugging Face directory or a .model file")
    file = model_file(path)
    if file is not None:
        try:
            return SentencePieceEncoder(file, _added_tokens(file.parent) if path.is_dir() else {})
        except (RuntimeError, OSError) as error:
            raise UserError(f"tokenizer {file}: not a SentencePiece model ({error})") from error
    if (path / "tokenizer.json").is_file():
        return FastEncoder(path)
    raise UserError(f"tokenizer {path}: neither tokenizer.model nor tokenizer.json is there. Give another directory")
