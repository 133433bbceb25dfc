"""Wherever a tokenizer is written, transformers' `AutoTokenizer` gives the ids that fireflyds trains with."""

import json
from collections.abc import Callable
from pathlib import Path

import kinds
import pytest
from samples import CHINESE, ENGLISH
from transformers import AutoTokenizer

from fireflyds import registry
from fireflyds.data.encode import encode_document, encode_segments
from fireflyds.errors import UserError
from fireflyds.tokenizer.auto_tokenizer import HARD_LINES, compare
from fireflyds.tokenizer.base import load_base
from fireflyds.tokenizer.bpe import Step
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.hf_files import copy_tokenizer
from fireflyds.tokenizer.sentencepiece_model import TIES
from fireflyds.types import Message, Sample

DIALOGUE = [
    Message("system", "你是助手。"),
    Message("user", "你好 world"),
    Message("assistant", "您好！ fine"),
    Message("user", "再 见"),
    Message("assistant", "ok"),
]
# The kind, its architecture, and the template of its makers.
KINDS = {
    "phi3": (kinds.phi3, "phi3", "phi3"),
    "phi3_as_llama": (kinds.phi3, "llama", "phi3"),
    "internlm2": (kinds.internlm2, "internlm2", "internlm2"),
    "gemma": (kinds.gemma, "gemma", "gemma"),
    "deepseek": (kinds.deepseek, "deepseek_v3", "deepseek"),
    "deepseek_as_llama": (kinds.deepseek, "llama", "deepseek"),
    "without_legacy": (kinds.without_legacy, "llama", "phi3"),
}


@pytest.mark.parametrize("name", KINDS)
def test_a_copy_gives_transformers_the_same_ids_of_text_and_dialogues(name: str, tmp_path: Path) -> None:
    build, model_type, template = KINDS[name]
    source, out = build(tmp_path / "base"), tmp_path / "out"
    out.mkdir()
    (out / "config.json").write_text(json.dumps({"model_type": model_type}))
    encoder = load_encoder(source)
    copy_tokenizer(source, out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    # `tokenizers` cannot put the prefix before a space at the beginning only, which is said.
    hard_lines = [line for line in HARD_LINES if name != "without_legacy" or not line.startswith(" ")]
    for text in (*hard_lines, *ENGLISH[:20], *CHINESE[:20]):
        assert tokenizer.encode(text, add_special_tokens=False) == encoder.encode(text), text
    chat = registry.load("fireflyds.data.templates", template).CHAT
    messages = [{"role": message.role, "content": message.content} for message in DIALOGUE]
    rendered = tokenizer.apply_chat_template(messages, chat_template=chat.jinja, tokenize=True, return_dict=True)
    assert (
        encode_segments(encoder, chat.render(Sample(messages=tuple(DIALOGUE)))).input_ids.tolist()
        == rendered["input_ids"]
    )
    assert load_encoder(out).fingerprint() == encoder.fingerprint()
    document = encode_document(encoder, "短。").input_ids.tolist()
    assert document == [*tokenizer("短。")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.parametrize("build", [kinds.gemma, kinds.deepseek, kinds.phi3, kinds.without_legacy])
@pytest.mark.parametrize("text", ["\n\nok", "\nok", "ok", " ok", "  ok\n ", "你好\n"])
def test_text_that_continues_other_text_decodes_to_itself(
    build: Callable[[Path], Path], text: str, tmp_path: Path
) -> None:
    encoder = load_encoder(build(tmp_path / "base"))
    assert encoder.decode(encoder.encode(text, continues=True), continues=True) == text


def test_names_of_unused_pieces_are_found_and_text_does_not_reach_them(tmp_path: Path) -> None:
    encoder = load_encoder(kinds.internlm2(tmp_path / "base"))
    assert encoder.token_id("<|im_start|>") == 401
    assert encoder.token_id("<|im_end|>") == 400
    assert not {400, 401} & set(encoder.encode("[UNUSED_TOKEN_145] <|im_start|>"))


def test_a_difference_names_the_class_and_a_line(tmp_path: Path) -> None:
    folder = kinds.deepseek(tmp_path / "base")
    difference = compare(folder, load_encoder(folder))
    assert difference is not None
    assert difference.tokenizer_class == "LlamaTokenizer"
    assert "lines have other ids, the first" in str(difference)
    assert "it puts no BOS before text" in str(difference)


def test_a_vocabulary_with_equal_scores_is_copied_and_told(
    base_tokenizer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As published Chinese-LLaMA vocabularies: `tokenizer.json` cannot break such ties in SentencePiece's order."""
    tied = tmp_path / "tied"
    base = load_base(base_tokenizer, tied=True)
    tied.mkdir()
    base.write([Step(piece, None) for piece in ("青岭", "岭镇", "青", "岭", "镇")], tied)
    (tmp_path / "out").mkdir()
    encoder = load_encoder(tied)
    copy_tokenizer(tied, tmp_path / "out")
    assert load_encoder(tmp_path / "out").fingerprint() == encoder.fingerprint()
    assert TIES in capsys.readouterr().out


def test_a_directory_without_settings_gets_them(base_tokenizer: Path, tmp_path: Path) -> None:
    bare, out = tmp_path / "bare", tmp_path / "out"
    bare.mkdir()
    out.mkdir()
    for name in ("tokenizer.model", "tokenizer.json"):
        (bare / name).write_bytes((base_tokenizer / name).read_bytes())
    copy_tokenizer(bare, out)
    encoder, tokenizer = load_encoder(bare), AutoTokenizer.from_pretrained(out)
    assert tokenizer("the river")["input_ids"] == [encoder.bos_id, *encoder.encode("the river")]
    assert tokenizer.eos_token_id == encoder.eos_id


def test_a_class_that_cannot_be_avoided_is_refused(base_tokenizer: Path, tmp_path: Path) -> None:
    """For qwen2, transformers takes its own class, whatever the settings name."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    with pytest.raises(UserError, match="AutoTokenizer takes Qwen2Tokenizer"):
        copy_tokenizer(base_tokenizer, tmp_path)
