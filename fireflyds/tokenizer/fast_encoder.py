"""Encoder of `tokenizer.json` files."""

import hashlib
import json
import re
from collections.abc import Sequence

import numpy as np

from fireflyds.tokenizer.byte_level import byte_values
from fireflyds.tokenizer.dummy_prefix import Lead, lead_of
from fireflyds.types import Strip


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
        self.vocab_size: int = max(self._model.get_vocab().values()) + 1
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.adds_bos = adds_bos
        self.chat_template: str | None = None
        self._bytes = byte_values() if '"ByteLevel"' in document else None
        unknown = getattr(self._model.model, "unk_token", None)
        complete = self._bytes is not None or self._model.token_to_id("<0x0A>") is not None
        self.unknown_id: int | None = None if complete or unknown is None else self._model.token_to_id(unknown)
        added = self._model.get_added_tokens_decoder().values()
        self._strips = {token.content: Strip(left=token.lstrip, right=token.rstrip) for token in added}
        special = [token.content for token in added if token.special and not token.rstrip]
        self._lead: Lead | None = None
        self.prefix_after_special = False
        if self._model.encode("a", add_special_tokens=False).tokens[0].startswith("▁"):  # the dummy prefix
            after = [self._model.encode(f"{token}a", add_special_tokens=False).tokens[1:] for token in special[:1]]
            self.prefix_after_special = after in ([], [self._model.encode("a", add_special_tokens=False).tokens])
            self._lead = lead_of(self.encode, self.fragments().__contains__)
        # The text of a special token in a document is encoded as ordinary text.
        self._model.encode_special_tokens = True

    def encode(self, text: str, *, continues: bool = False) -> list[int]:
        """Returns the ids of plain text, without special tokens; `continues`: without the dummy prefix."""
        if continues and self._lead is not None:
            ids = self._model.encode(self._lead.text + text, add_special_tokens=False).ids
            return list(ids[len(self._lead.ids) :])
        return list(self._model.encode(text, add_special_tokens=False).ids)

    def begins_with(self, index: int) -> bool:
        """True where the post-processor of the file puts the token before text."""
        return bool(self._model.encode("a").ids[:1] == [index])

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of each text, as `encode` does."""
        return [encoding.ids for encoding in self._model.encode_batch_fast(list(texts), add_special_tokens=False)]

    def token_id(self, token: str) -> int | None:
        """Returns the id of a token; None if the vocabulary does not contain it."""
        index = self._model.token_to_id(token)
        return None if index is None else int(index)

    def special_tokens(self) -> tuple[str, ...]:
        """Returns the texts of the special tokens."""
        added = self._model.get_added_tokens_decoder().values()
        return tuple(token.content for token in added if token.special)

    def strip_of(self, token: str) -> Strip:
        """Returns the white space that a special token removes from the text beside it."""
        return self._strips.get(token, Strip())

    def decode(self, ids: Sequence[int], *, continues: bool = False) -> str:
        """Returns the text of the ids, without special tokens; `continues`: they follow other text."""
        if continues and self._lead is not None:
            text = str(self._model.decode([*self._lead.ids, *ids], skip_special_tokens=True))
            return text[len(self._lead.text) :]
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
        """Returns the SHA-256 hash of the tokenizer's document, of its use of BOS and of its special ids."""
        document = json.loads(self._model.to_str())
        del document["post_processor"]  # it adds special tokens, which `adds_bos` stands for here
        document["settings"] = [self.adds_bos, self.bos_id, self.eos_id]
        return hashlib.sha256(json.dumps(document).encode()).hexdigest()
