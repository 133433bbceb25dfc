"""Encoders for the two tokenizer file formats: SentencePiece `.model` and `tokenizer.json`."""

import hashlib
import re
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece

from fireflyds.errors import UserError
from fireflyds.tokenizer.settings import added_tokens, adds_bos, content, settings_of
from fireflyds.types import Encoder

# A token in base64 and its rank.
_TIKTOKEN_RANK = re.compile(rb"[A-Za-z0-9+/]+=* \d+")


_LEADS = ("\n", "\x01", "\x7f", "\U000e0001")


class SentencePieceEncoder:
    """Encodes with the SentencePiece library; the conversion in transformers may break ties differently.

    `bos_token` and `eos_token`: names in the settings of a directory, which count before those of the model.
    """

    def __init__(
        self,
        model: bytes,
        added_tokens: dict[str, int] | None = None,
        *,
        adds_bos: bool = True,
        bos_token: str | None = None,
        eos_token: str | None = None,
    ) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        added_tokens = added_tokens or {}
        self._added = {token: index for token, index in added_tokens.items() if index >= self._model.get_piece_size()}
        self.vocab_size: int = max([self._model.get_piece_size(), *(index + 1 for index in self._added.values())])
        self.bos_id = self._special_id(bos_token, self._model.bos_id())
        self.eos_id = self._special_id(eos_token, self._model.eos_id())
        self.adds_bos = adds_bos
        has_dummy_prefix = self._model.encode("a", out_type=str)[0].startswith("▁")
        self._lead = _lead_of(self._model.encode, self._model.is_byte) if has_dummy_prefix else None

    def _special_id(self, name: str | None, of_model: int) -> int | None:
        named = None if name is None else self.token_id(name)
        return named if named is not None else of_model if of_model >= 0 else None

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Returns the ids of plain text, without special tokens; `continues`: without the dummy prefix."""
        if not text:
            return []
        if continues and self._lead is not None:
            lead, length = self._lead
            return list(self._model.encode(lead + text)[length:])
        return list(self._model.encode(text))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, as `encode` does."""
        return list(self._model.encode(list(texts), num_threads=1))

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token; None if the vocabulary does not contain it."""
        if token in self._added:
            return self._added[token]
        index = int(self._model.piece_to_id(token))
        return None if index == self._model.unk_id() else index

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids, without added tokens."""
        return str(self._model.decode([index for index in ids if index < self._model.get_piece_size()]))

    def fragments(self) -> frozenset[int]:
        """Returns the ids of byte pieces."""
        return frozenset(index for index in range(self._model.get_piece_size()) if self._model.is_byte(index))

    def token(self, index: int) -> str:
        """Returns the text of a token, with spaces for `▁`; empty for an unused id."""
        if index >= self._model.get_piece_size():
            return next((token for token, added in self._added.items() if added == index), "")
        return str(self._model.id_to_piece(index)).replace("▁", " ")

    def token_bytes(self) -> np.ndarray:
        """Returns the number of UTF-8 bytes of text per token: int32 `[vocab_size]`, 0 for special tokens."""
        counts = np.zeros(self.vocab_size, np.int32)
        for index in range(self._model.get_piece_size()):
            if self._model.is_byte(index):
                counts[index] = 1
            elif not (self._model.is_control(index) or self._model.is_unknown(index) or self._model.is_unused(index)):
                counts[index] = len(self.token(index).encode())
        return counts

    def fingerprint(self) -> str:
        """Returns the SHA-256 hash of the model, of its use of BOS and of special tokens that the settings name."""
        special = [(self.bos_id, self._model.bos_id()), (self.eos_id, self._model.eos_id())]
        renamed = [index for index, of_model in special if index is not None and index != of_model]
        settings = ("" if self.adds_bos else "no BOS") + "".join(f" {index}" for index in renamed)
        return hashlib.sha256(self._model.serialized_model_proto() + settings.encode()).hexdigest()


class FastEncoder:
    """Encodes with `tokenizers`, for directories that have only a `tokenizer.json`, whose text is `document`."""

    def __init__(
        self, document: str, *, bos_id: int | None = None, eos_id: int | None = None, adds_bos: bool = True
    ) -> None:
        from tokenizers import Tokenizer

        self._model = Tokenizer.from_str(document)
        # A file may carry its own limits, which would cut documents.
        self._model.no_truncation()
        self._model.no_padding()
        if getattr(self._model.model, "dropout", None):
            self._model.model.dropout = None
        # The text of a special token in a document is encoded as ordinary text.
        self._model.encode_special_tokens = True
        self.vocab_size: int = max(self._model.get_vocab().values()) + 1
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.adds_bos = adds_bos
        self._bytes = byte_values() if '"ByteLevel"' in document else None
        self._lead: tuple[str, int] | None = None
        if self._model.encode("a", add_special_tokens=False).tokens[0].startswith("▁"):  # the dummy prefix
            self._lead = _lead_of(self.encode, self.fragments().__contains__)

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Returns the ids of plain text, without special tokens; `continues`: without the dummy prefix."""
        if continues and self._lead is not None:
            lead, length = self._lead
            return list(self._model.encode(lead + text, add_special_tokens=False).ids[length:])
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, as `encode` does."""
        return [encoding.ids for encoding in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token; None if the vocabulary does not contain it."""
        index = self._model.token_to_id(token)
        return None if index is None else int(index)

    def decode(self, ids: Sequence[int]) -> str:
        """Returns the text of the ids, without special tokens."""
        return str(self._model.decode(list(ids), skip_special_tokens=True))

    def fragments(self) -> frozenset[int]:
        """Returns the ids of tokens whose bytes are an incomplete character."""
        return frozenset(index for token, index in self._model.get_vocab().items() if self._text(token) is None)

    def token(self, index: int) -> str:
        """Returns the text of a token, or its spelling where its bytes are an incomplete character."""
        token = str(self._model.id_to_token(index))
        return self._text(token) or token

    def token_bytes(self) -> np.ndarray:
        """Returns the number of UTF-8 bytes of text per token: int32 `[vocab_size]`, 0 for special tokens."""
        counts = np.zeros(self.vocab_size, np.int32)
        for token, index in self._model.get_vocab().items():
            counts[index] = self._num_bytes(token)
        for index, added in self._model.get_added_tokens_decoder().items():
            counts[index] = 0 if added.special else len(added.content.encode())
        return counts

    def _num_bytes(self, token: str) -> int:
        if self._bytes is not None and all(character in self._bytes for character in token):
            return len(token)  # one character per byte
        text = self._text(token)
        return 1 if text is None else len(text.encode())

    def _text(self, token: str) -> str | None:
        """Returns the text of a token; None where its bytes are an incomplete character."""
        if self._bytes is None:
            return None if re.fullmatch("<0x[0-9A-F]{2}>", token) else token.replace("▁", " ")
        values = [self._bytes.get(character) for character in token]
        if None in values:  # an added token, which is not byte-encoded
            return token
        try:
            return bytes(value for value in values if value is not None).decode()
        except UnicodeDecodeError:
            return None

    def fingerprint(self) -> str:
        """Returns the SHA-256 hash of the tokenizer's document and of its use of BOS."""
        return hashlib.sha256(f"{self._model.to_str()}{'' if self.adds_bos else 'no BOS'}".encode()).hexdigest()


def _lead_of(encode: Callable[[str], list[int]], is_byte: Callable[[int], bool]) -> tuple[str, int]:
    """Returns a character to put before text that continues other text, so that the text gets no dummy prefix, and its
    number of tokens. It ends in a byte token, which merges with nothing; a newline may be a piece of its own."""
    for lead in _LEADS:
        ids = encode(lead)
        if ids and is_byte(ids[-1]):
            return lead, len(ids)
    return _LEADS[0], len(encode(_LEADS[0]))


@cache
def byte_values() -> dict[str, int]:
    """Returns the byte of each character in byte-level BPE (GPT-2's table): printable Latin-1 characters map to
    their own code, the other bytes are numbered from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + n): byte for n, byte in enumerate(others)}


def model_file(path: str | Path) -> Path | None:
    """Returns the SentencePiece file at `path` (a `.model`, or a directory with `tokenizer.model`); None if absent.

    Also None where `tokenizer.model` holds tiktoken's ranks, as Meta ships Llama 3, and `tokenizer.json` is beside it.

    Raises:
        UserError: there is no `tokenizer.json` beside tiktoken's ranks.
    """
    path = Path(path)
    file = path / "tokenizer.model" if path.is_dir() else path
    if file.suffix != ".model" or not file.is_file():
        return None
    with file.open("rb") as stream:
        has_ranks = _TIKTOKEN_RANK.fullmatch(stream.readline(200).rstrip(b"\r\n"))
    if not has_ranks:
        return file
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return None
    raise UserError(
        "holds tiktoken's ranks, which are no SentencePiece model",
        key=f"tokenizer {file}",
        remedy="Give a directory with the tokenizer.json of the model's Hugging Face version",
    )


def load_encoder(path: str | Path) -> Encoder:
    """Loads the encoder of a `.model` file or of a Hugging Face directory.

    Raises:
        UserError: the path does not exist, or there is no readable tokenizer.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(
            "no such file or directory",
            key=f"tokenizer {path}",
            remedy="Give a Hugging Face directory or a .model file",
        )
    file = model_file(path)
    if file is not None:
        try:
            if not path.is_dir():
                return SentencePieceEncoder(file.read_bytes())
            added, settings = {row["content"]: row["id"] for row in added_tokens(path)}, settings_of(path)
            return SentencePieceEncoder(
                file.read_bytes(),
                added,
                adds_bos=adds_bos(path),
                bos_token=content(settings.get("bos_token")),
                eos_token=content(settings.get("eos_token")),
            )
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"not a SentencePiece model ({error})",
                key=f"tokenizer {file}",
                remedy="Get the file again, or give another",
            ) from error
    if (path / "tokenizer.json").is_file():
        from transformers import AutoTokenizer

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (ValueError, OSError) as error:
            raise UserError(
                str(error).splitlines()[0],
                key=f"tokenizer {path}",
                remedy=(
                    "Custom tokenizer code is not executed: give a tokenizer that this version of transformers supports"
                ),
            ) from error
        document = (path / "tokenizer.json").read_text(encoding="utf-8")
        has_bos = tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]
        return FastEncoder(document, bos_id=tokenizer.bos_token_id, eos_id=tokenizer.eos_token_id, adds_bos=has_bos)
    raise UserError(
        "neither tokenizer.model nor tokenizer.json found", key=f"tokenizer {path}", remedy="Give another directory"
    )
