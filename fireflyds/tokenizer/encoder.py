"""Loads the encoder of a tokenizer: a SentencePiece `.model`, or a Hugging Face directory."""

import re
from pathlib import Path
from typing import Any

from fireflyds.errors import UserError
from fireflyds.tokenizer.fast_encoder import FastEncoder
from fireflyds.tokenizer.sentencepiece_encoder import SentencePieceEncoder
from fireflyds.tokenizer.sentencepiece_model import directory_proto
from fireflyds.tokenizer.settings import (
    added_tokens,
    adds_bos,
    chat_template,
    content,
    prefixes_after_special,
    raw_settings,
    settings_of,
)
from fireflyds.types import Encoder, Strip

# A token in base64 and its rank.
_TIKTOKEN_RANK = re.compile(rb"[A-Za-z0-9+/]+=* \d+")


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
    if not holds_ranks(file):
        return file
    if path.is_dir() and (path / "tokenizer.json").is_file():
        return None
    raise UserError(
        "holds tiktoken's ranks, which are no SentencePiece model",
        key=f"tokenizer {file}",
        remedy="Convert the model with launch/convert.py, or give the tokenizer.json of its Hugging Face version",
    )


def holds_ranks(file: Path) -> bool:
    """True for a file of tiktoken's ranks."""
    if not file.is_file():
        return False
    with file.open("rb") as stream:
        return _TIKTOKEN_RANK.fullmatch(stream.readline(200).rstrip(b"\r\n")) is not None


def load_encoder(path: str | Path) -> Encoder:
    """Loads the encoder of a `.model` file or of a Hugging Face directory, with the chat template of the directory.

    Raises:
        UserError: the path does not exist, or there is no readable tokenizer.
    """
    encoder = _load(path)
    encoder.chat_template = chat_template(Path(path)) if Path(path).is_dir() else None
    return encoder


def _load(path: str | Path) -> Encoder:
    """As `load_encoder`, without the chat template.

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
            return _sentencepiece_encoder(file, path)
        except (RuntimeError, OSError) as error:
            raise UserError(
                f"not a SentencePiece model ({error})",
                key=f"tokenizer {file}",
                remedy="Get the file again, or give another",
            ) from error
    if (path / "tokenizer.json").is_file():
        return _json_encoder(path, (path / "tokenizer.json").read_text(encoding="utf-8"))
    if (path / "vocab.json").is_file() and (path / "merges.txt").is_file():
        return _json_encoder(path, _auto_tokenizer(path).backend_tokenizer.to_str())
    raise UserError(
        "neither tokenizer.model nor tokenizer.json found", key=f"tokenizer {path}", remedy="Give another directory"
    )


def _sentencepiece_encoder(file: Path, path: Path) -> SentencePieceEncoder:
    if not path.is_dir():
        return SentencePieceEncoder(file.read_bytes())
    proto, remaining = directory_proto(file, path)
    settings = settings_of(path)
    return SentencePieceEncoder(
        proto.SerializeToString(),
        {row["content"]: row["id"] for row in remaining},
        adds_bos=adds_bos(path),
        bos_token=content(settings.get("bos_token")),
        eos_token=content(settings.get("eos_token")),
        prefix_after_special=prefixes_after_special(path),
        strips={row["content"]: Strip(left=row["lstrip"], right=row["rstrip"]) for row in added_tokens(path)},
    )


def _json_encoder(path: Path, document: str) -> FastEncoder:
    """The names of special tokens in the settings count, and `add_bos_token` before the file's own post-processor:
    transformers' classes apply it (DeepSeek's file itself adds no BOS). Without names, those of the class count."""
    settings = raw_settings(path)
    try:
        encoder = FastEncoder(document)
    except Exception as error:  # the library raises Exception itself
        raise UserError(
            f"not a tokenizer ({error})", key=f"tokenizer {path / 'tokenizer.json'}", remedy="Get the file again"
        ) from error
    names = {key: content(settings.get(key)) for key in ("bos_token", "eos_token")}
    if "eos_token" not in settings:
        tokenizer = _auto_tokenizer(path)
        names = {key: getattr(tokenizer, key) for key in names}
    encoder.bos_id, encoder.eos_id = (
        None if name is None else encoder.token_id(name) for name in (names["bos_token"], names["eos_token"])
    )
    adds = settings.get("add_bos_token")
    encoder.adds_bos = encoder.bos_id is not None and (encoder.begins_with(encoder.bos_id) if adds is None else adds)
    return encoder


def _auto_tokenizer(path: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (ValueError, OSError) as error:
        raise UserError(
            str(error).splitlines()[0],
            key=f"tokenizer {path}",
            remedy="Custom tokenizer code is not executed: give a tokenizer that this version of transformers supports",
        ) from error
