"""Encoder of SentencePiece's `.model` files."""

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import sentencepiece

from fireflyds.tokenizer.dummy_prefix import lead_of
from fireflyds.types import Strip


class SentencePieceEncoder:
    """Encodes with the SentencePiece library; the conversion in transformers may break ties differently.

    `added_tokens`: ids of tokens that are no pieces of the model. `bos_token` and `eos_token`: names in the settings of
    a directory, which count before those of the model. `strips`: the white space that special tokens remove.
    """

    def __init__(
        self,
        model: bytes,
        added_tokens: Mapping[str, int] | None = None,
        *,
        adds_bos: bool = True,
        bos_token: str | None = None,
        eos_token: str | None = None,
        prefix_after_special: bool = True,
        strips: Mapping[str, Strip] | None = None,
    ) -> None:
        self._model = sentencepiece.SentencePieceProcessor(model_proto=model)
        added_tokens = added_tokens or {}
        self._added = {token: index for token, index in added_tokens.items() if index >= self._model.get_piece_size()}
        self.vocab_size: int = max([self._model.get_piece_size(), *(index + 1 for index in self._added.values())])
        self.bos_id = self._special_id(bos_token, self._model.bos_id())
        self.eos_id = self._special_id(eos_token, self._model.eos_id())
        self.adds_bos = adds_bos
        has_bytes = self._model.is_byte(self._model.piece_to_id("<0x0A>"))
        self.unknown_id: int | None = None if has_bytes else int(self._model.unk_id())
        self.chat_template: str | None = None
        has_dummy_prefix = self._model.encode("a", out_type=str)[0].startswith("▁")
        self._lead = lead_of(self._model.encode, self._model.is_byte) if has_dummy_prefix else None
        self.prefix_after_special = prefix_after_special and has_dummy_prefix
        self._strips = dict(strips or {})

    def _special_id(self, name: str | None, of_model: int) -> int | None:
        named = None if name is None else self.token_id(name)
        return named if named is not None else of_model if of_model >= 0 else None

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Returns the ids of plain text, without special tokens; `continues`: without the dummy prefix."""
        if not text:
            return []
        if continues and self._lead is not None:
            return list(self._model.encode(self._lead.text + text)[len(self._lead.ids) :])
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

    def special_tokens(self) -> tuple[str, ...]:
        """Returns the texts of the control pieces and of the tokens that are no pieces."""
        pieces = range(self._model.get_piece_size())
        return (*(self._model.id_to_piece(index) for index in pieces if self._model.is_control(index)), *self._added)

    def strip_of(self, token: str) -> Strip:
        """Returns the white space that a special token removes from the text beside it."""
        return self._strips.get(token, Strip())

    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
        """Returns the text of the ids, without added tokens; `continues`: they follow other text."""
        ids = [index for index in ids if index < self._model.get_piece_size()]
        if continues and self._lead is not None:
            return str(self._model.decode([*self._lead.ids, *ids]))[len(self._lead.text) :]
        return str(self._model.decode(ids))

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
        """Returns the SHA-256 hash of the model and of all settings that change the ids of documents and dialogues."""
        special = [(self.bos_id, self._model.bos_id()), (self.eos_id, self._model.eos_id())]
        renamed = [index for index, of_model in special if index is not None and index != of_model]
        settings = ("" if self.adds_bos else "no BOS") + "".join(f" {index}" for index in renamed)
        settings += "" if self.prefix_after_special or self._lead is None else " no prefix after special tokens"
        settings += "".join(f" {token}{strip}" for token, strip in sorted(self._strips.items()) if strip != Strip())
        return hashlib.sha256(self._model.serialized_model_proto() + settings.encode()).hexdigest()
