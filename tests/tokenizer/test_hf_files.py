"""Tokenizers written for AutoTokenizer give SentencePiece's ids."""

import json
import shutil
from pathlib import Path

import pytest
from samples import CHINESE, ENGLISH
from sentencepiece import sentencepiece_model_pb2 as sp_pb2
from transformers import AutoTokenizer

from fireflyds.errors import UserError
from fireflyds.tokenizer.base import load_base
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.hf_files import write_tokenizer
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.tokenizer.sentencepiece_model import CUTS, TIES, disagreement
from fireflyds.tokenizer.vocabulary_merge import plan_merge

CODE = [
    "def f(x):\n    return  x ** 2  # 注释",
    "\tif a:\n\t\tb = 1\n\n",
    "  two  spaces  ",
    "a",
    "",
    "emoji 🐉 and ﷽",
    "全角，标点。",
]


@pytest.fixture(scope="module")
def expanded_tokenizer(base_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("merged")
    base = load_base(base_tokenizer)
    words = [*dict.fromkeys("".join(CHINESE)), "特产", "青岭镇", "流经", "清水河"]
    base.write(plan_merge(base, words, Scripts(["Han", "CJK_Punctuation"])).steps, folder)
    return folder


def test_auto_tokenizer_agrees_with_sentencepiece(expanded_tokenizer: Path) -> None:
    fast, sentencepiece_encoder = AutoTokenizer.from_pretrained(expanded_tokenizer), load_encoder(expanded_tokenizer)
    assert len(fast) == sentencepiece_encoder.vocab_size
    for text in [*ENGLISH, *CHINESE, *CODE, *(a + b for a, b in zip(ENGLISH, CHINESE, strict=False))]:
        if text:
            assert fast.encode(text, add_special_tokens=False) == sentencepiece_encoder.encode(text), text
            assert (
                fast.decode(sentencepiece_encoder.encode(text))
                == sentencepiece_encoder.decode(sentencepiece_encoder.encode(text))
                == text
            )


def test_auto_tokenizer_adds_bos_and_has_the_special_tokens(expanded_tokenizer: Path) -> None:
    fast, sentencepiece_encoder = AutoTokenizer.from_pretrained(expanded_tokenizer), load_encoder(expanded_tokenizer)
    assert fast.encode("hello")[0] == sentencepiece_encoder.bos_id == fast.bos_token_id
    assert fast.eos_token_id == sentencepiece_encoder.eos_id
    assert fast.encode("</s>", add_special_tokens=False) == [sentencepiece_encoder.eos_id]


def test_continued_text_has_no_dummy_prefix(expanded_tokenizer: Path) -> None:
    sentencepiece_encoder = load_encoder(expanded_tokenizer)
    assert sentencepiece_encoder.encode("the river") != sentencepiece_encoder.encode("the river", continues=True)
    assert sentencepiece_encoder.encode(" the river", continues=True) == sentencepiece_encoder.encode("the river")
    assert (
        sentencepiece_encoder.decode(
            [*sentencepiece_encoder.encode("near"), *sentencepiece_encoder.encode("by", continues=True)]
        )
        == "nearby"
    )


def _proto(folder: Path) -> sp_pb2.ModelProto:
    proto = sp_pb2.ModelProto()
    proto.ParseFromString((folder / "tokenizer.model").read_bytes())
    return proto


@pytest.mark.parametrize("prefix", [False, True])
def test_user_defined_pieces_split_text_equally_in_both_encoders(
    expanded_tokenizer: Path, tmp_path: Path, prefix: bool
) -> None:
    proto = _proto(expanded_tokenizer)
    proto.pieces.add(piece="<tool>", score=0.0, type=sp_pb2.ModelProto.SentencePiece.USER_DEFINED)
    proto.normalizer_spec.add_dummy_prefix = prefix
    write_tokenizer(proto, tmp_path)
    fast, sentencepiece_encoder = AutoTokenizer.from_pretrained(tmp_path), load_encoder(tmp_path)
    for text in ["a<tool>b 河流<tool>", "the river <tool> nearby", "x<tool><tool>\n"]:
        ids = sentencepiece_encoder.encode(text)
        assert fast.encode(text, add_special_tokens=False) == ids
        assert sentencepiece_encoder.token_id("<tool>") in ids
        assert fast.decode(ids) == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda proto: setattr(proto.trainer_spec, "model_type", 1), "model_type is UNIGRAM, not BPE"),
        (lambda proto: setattr(proto.normalizer_spec, "precompiled_charsmap", b"x"), "not identity"),
        (lambda proto: setattr(proto.normalizer_spec, "remove_extra_whitespaces", True), "removes extra white space"),
        (lambda proto: setattr(proto.trainer_spec, "bos_id", -1), "has no BOS"),
        (lambda proto: setattr(proto.trainer_spec, "treat_whitespace_as_suffix", True), "space marks follow words"),
    ],
)
def test_models_that_tokenizer_json_cannot_express_are_refused(
    expanded_tokenizer: Path, tmp_path: Path, change, message
) -> None:
    proto = _proto(expanded_tokenizer)
    change(proto)
    with pytest.raises(UserError, match=message):
        write_tokenizer(proto, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_disagreement_reports_ties_and_user_defined_pieces(expanded_tokenizer: Path) -> None:
    proto = _proto(expanded_tokenizer)
    assert disagreement(proto) is None
    proto.pieces.add(piece="<tool>", score=0.0, type=sp_pb2.ModelProto.SentencePiece.USER_DEFINED)
    assert disagreement(proto) == CUTS
    proto = _proto(expanded_tokenizer)
    proto.pieces[-1].score = proto.pieces[-2].score
    assert disagreement(proto) == TIES


def test_flags_of_added_tokens_and_settings_are_kept(expanded_tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(expanded_tokenizer, source)
    proto = _proto(expanded_tokenizer)
    size = len(proto.pieces)
    (source / "tokenizer.json").unlink()
    (source / "special_tokens_map.json").write_text('{"pad_token": "<unk>"}')
    flags = {"special": False, "rstrip": True, "lstrip": False, "normalized": False, "single_word": False}
    settings = {
        "tokenizer_class": "LlamaTokenizer",
        "added_tokens_decoder": {str(size): flags | {"content": "<|user|>"}},
        "add_bos_token": False,
    }
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    base = load_base(source)
    assert base.num_tokens == size + 1
    (tmp_path / "out").mkdir()
    base.write([], tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<|user|>") == size
    assert tokenizer.pad_token == "<unk>"
    assert tokenizer.padding_side == "left"
    with_break = tokenizer.encode("<|user|>\nriver", add_special_tokens=False)
    assert with_break == tokenizer.encode("<|user|>river", add_special_tokens=False)  # rstrip eats the line break
    assert tokenizer.decode([size], skip_special_tokens=True) == "<|user|>"


def test_a_special_token_without_an_id_is_refused(expanded_tokenizer: Path, tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(expanded_tokenizer, source)
    settings = json.loads((source / "tokenizer_config.json").read_text()) | {"pad_token": "<pad>"}
    (source / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="pad_token is '<pad>', which has no id"):
        load_base(source)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json", "added_tokens.json"])
@pytest.mark.parametrize("content", ["{broken", "[]"])
def test_errors_name_corrupt_files(expanded_tokenizer: Path, tmp_path: Path, name: str, content: str) -> None:
    shutil.copytree(expanded_tokenizer, tmp_path / "source")
    (tmp_path / "source" / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}: (cannot be read as JSON|an object was expected)"):
        load_base(tmp_path / "source")
