"""Base tokenizers in `tokenizer.json`: byte-level BPE (Llama-3, Qwen, Falcon), or BPE with byte fallback."""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fireflyds.errors import UserError
from fireflyds.fs import read_json
from fireflyds.tokenizer.bpe import Bpe, Step
from fireflyds.tokenizer.byte_level import byte_values
from fireflyds.tokenizer.fast_encoder import FastEncoder
from fireflyds.tokenizer.hf_files import write_settings
from fireflyds.tokenizer.pretokenizer import num_cut_words, with_marks
from fireflyds.tokenizer.settings import content, settings_of, with_bos, without_limits


class JsonBase:
    """A `tokenizer.json` file. New pieces are numbered after the last id in use; new merges follow the last merge."""

    disagreement: str | None = None
    num_added_bytes = 0

    def __init__(self, folder: Path, *, marks: bool = False) -> None:
        self._folder = folder
        file = folder / "tokenizer.json"
        try:
            self._document = without_limits(read_json(file))
            model = self._document["model"]
            kind, self._vocab, merges = model["type"], model["vocab"], model.get("merges", [])
        except (KeyError, TypeError) as error:
            raise UserError(
                f"not a tokenizer ({type(error).__name__}: {error})", key=file, remedy="Give another base"
            ) from error
        self.has_fragments = '"ByteLevel"' in json.dumps(
            [self._document.get("pre_tokenizer"), self._document.get("decoder")]
        )
        if kind != "BPE" or not (self.has_fragments or model.get("byte_fallback")):
            raise UserError(
                f"a {kind} model {('without byte fallback ' if kind == 'BPE' else '')}cannot be merged into",
                key=file,
                remedy="Give a base with byte-level BPE, or BPE with byte fallback",
            )
        self._merges = [tuple(merge.split(" ", 1)) if isinstance(merge, str) else tuple(merge) for merge in merges]
        # `tokenizers` renumbers added tokens that are not in the model's vocabulary; new pieces follow them.
        self._vocab |= {row["content"]: row["id"] for row in self._document.get("added_tokens", [])}
        self.num_tokens = max(self._vocab.values()) + 1
        self._original = self._document
        if marks:
            changed = with_marks(self._document)
            if changed is None:
                raise UserError(
                    "the base's pre-tokenizer takes no words as \\p{L}+",
                    key="pretokenizer",
                    value="marks",
                    remedy="Leave it out: its words include marks already, or are not cut by an expression",
                )
            self._document = changed
        self._bytes = byte_values()
        self._base_bpe = self.bpe()
        self._characters = {byte: character for character, byte in self._bytes.items()}

    def bpe(self) -> Bpe:
        """Returns a copy of the base's merges, for planning."""
        return Bpe({pair: float(rank) for rank, pair in enumerate(self._merges)}, by_text=False)

    def spelled(self, text: str) -> str:
        """Converts text to the spelling of pieces: a character per byte (byte-level BPE), or `▁` for a space."""
        if self.has_fragments:
            return "".join(self._characters[byte] for byte in text.encode())
        return text.replace(" ", "▁")

    def text(self, piece: str) -> str | None:
        """Returns the text of a piece; None where its bytes are an incomplete character."""
        if not self.has_fragments:
            return piece.replace("▁", " ")
        try:
            return self.as_bytes(piece).decode()
        except UnicodeDecodeError:
            return None

    def as_bytes(self, piece: str) -> bytes:
        """Returns the UTF-8 bytes of a piece, which may be an incomplete character."""
        if not self.has_fragments:
            return piece.replace("▁", " ").encode()
        return bytes(self._bytes[character] for character in piece)

    def knows(self, piece: str) -> bool:
        """True where the piece is in the base's vocabulary."""
        return piece in self._vocab

    def old_ids(self, piece: str) -> list[int]:
        """Returns the base's ids of the text of a piece, without BOS and without the dummy prefix."""
        ids: list[int] = []
        for part in self._base_bpe.split(piece):
            part_id = self._vocab.get(part)
            ids += [part_id] if part_id is not None else [self._vocab[f"<0x{byte:02X}>"] for byte in part.encode()]
        return ids

    def encoder(self, steps: Sequence[Step]) -> FastEncoder:
        """Returns an in-memory encoder of the base with the steps appended."""
        return FastEncoder(json.dumps(self._merged(steps)))

    def original_encoder(self) -> FastEncoder:
        """Returns an encoder of the base as it is, also where its pre-tokenizer is changed."""
        return FastEncoder(json.dumps(self._original))

    def num_cut_words(self, words: list[str]) -> int:
        """Returns how many of the words with combining marks the base's pre-tokenizer cuts."""
        return num_cut_words(self._original, words)

    def write(self, steps: Sequence[Step], out: Path) -> None:
        """Writes `tokenizer.json` with the steps appended, and the settings of the base's directory."""
        settings, document = settings_of(self._folder), self._merged(steps)
        bos = content(settings.get("bos_token"))
        if bos is not None and settings.get("add_bos_token"):  # the base's class adds it, ours does not
            document = with_bos(document, bos, self._vocab[bos])
        (out / "tokenizer.json").write_text(json.dumps(document, ensure_ascii=False), encoding="utf-8")
        write_settings(out, settings, self._folder)
        if (self._folder / "special_tokens_map.json").is_file():
            shutil.copy2(self._folder / "special_tokens_map.json", out)

    def _merged(self, steps: Sequence[Step]) -> dict[str, Any]:
        document = copy.copy(self._document)
        vocab = self._vocab | {step.piece: self.num_tokens + index for index, step in enumerate(steps)}
        merges = [*self._merges, *(step.parts for step in steps if step.parts)]
        document["model"] = self._document["model"] | {"vocab": vocab, "merges": [list(pair) for pair in merges]}
        return document
