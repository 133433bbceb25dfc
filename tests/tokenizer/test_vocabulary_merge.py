"""A merge keeps the ids of old text, makes every new piece reachable, and round-trips text, on every kind of base."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
from bases import ADDED, KINDS
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from samples import CHINESE, ENGLISH
from transformers import AutoTokenizer

from fireflyds.config import PieceAlgorithm
from fireflyds.errors import UserError
from fireflyds.tokenizer.base import Base, load_base
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.learn import common_characters, count_words, learn_pieces
from fireflyds.tokenizer.pieces import read_pieces
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.tokenizer.vocabulary_merge import MergePlan, fill_missing_merges, plan_merge, unreachable
from fireflyds.types import Encoder

CHINESE_SCRIPTS = Scripts(["Han", "CJK_Punctuation"])


@dataclass(frozen=True, slots=True)
class MergedTokenizer:
    base: Base
    plan: MergePlan
    old: Encoder
    new: Encoder
    folder: Path


def plan_with_learned_pieces(
    base: Base, algorithm: PieceAlgorithm = PieceAlgorithm.bpe, texts=CHINESE, scripts=CHINESE_SCRIPTS
) -> MergePlan:
    words = count_words(texts, scripts)
    characters = common_characters(words, scripts, 1)
    encoder = base.encoder(plan_merge(base, characters, scripts).steps)
    pieces = learn_pieces(words, encoder, algorithm=algorithm, num_pieces=60, max_piece_length=4)
    return plan_merge(base, characters + pieces, scripts)


@pytest.fixture(scope="module", params=sorted(KINDS))
def merged(request, tmp_path_factory: pytest.TempPathFactory) -> MergedTokenizer:
    root = tmp_path_factory.mktemp(request.param)
    base = load_base(KINDS[request.param](root / "base"))
    plan = plan_with_learned_pieces(base)
    (root / "out").mkdir()
    base.write(plan.steps, root / "out")
    return MergedTokenizer(base, plan, load_encoder(root / "base"), load_encoder(root / "out"), root / "out")


ANY_TEXT = st.text(st.characters(blacklist_categories=("Cs",), blacklist_characters="▁\x00"))
OLD_TEXT = st.text(
    st.characters(blacklist_categories=("Cs",), blacklist_characters="▁\x00").filter(
        lambda c: not CHINESE_SCRIPTS.has(c)
    )
    | st.sampled_from(list("".join(ENGLISH) + "\n\t  “”—…·́"))
)
MIXED_TEXT = st.lists(st.sampled_from([*"".join(CHINESE), *ENGLISH[0].split(), " ", "\n", "：", "é", "9"])).map("".join)


@settings(max_examples=150, deadline=None)
@given(ANY_TEXT | MIXED_TEXT)
def test_any_string_round_trips(merged: MergedTokenizer, text: str) -> None:
    assert merged.new.decode(merged.new.encode(text)) == text


@settings(max_examples=150, deadline=None)
@given(OLD_TEXT)
def test_text_without_new_characters_keeps_its_ids(merged: MergedTokenizer, text: str) -> None:
    assert merged.new.encode(text) == merged.old.encode(text)


@settings(max_examples=100, deadline=None)
@given(ANY_TEXT | MIXED_TEXT)
def test_auto_tokenizer_gives_the_same_ids(merged: MergedTokenizer, text: str) -> None:
    auto_tokenizer = _auto_tokenizer(merged.folder)
    assume(not any(token in text for token in auto_tokenizer.get_added_vocab()))
    assert auto_tokenizer.encode(text, add_special_tokens=False) == merged.new.encode(text)


_AUTO_TOKENIZERS: dict[Path, object] = {}


def _auto_tokenizer(folder: Path):
    return _AUTO_TOKENIZERS.setdefault(folder, AutoTokenizer.from_pretrained(folder))


def test_every_new_piece_is_reached_and_has_the_next_id(merged: MergedTokenizer) -> None:
    assert len(merged.plan.steps) > 60
    assert unreachable(merged.base, merged.plan, merged.new) == []
    assert merged.new.vocab_size == merged.old.vocab_size + len(merged.plan.steps)
    for index, step in enumerate(merged.plan.steps, merged.base.num_tokens):
        text = merged.base.text(step.piece)
        if text is not None:
            assert merged.new.token(index) == text
            assert index in merged.new.encode(f"\n{text}\n")


def test_old_tokens_keep_their_ids(merged: MergedTokenizer) -> None:
    for index in range(merged.old.vocab_size):
        assert merged.new.token(index) == merged.old.token(index)


def test_chinese_takes_fewer_tokens(merged: MergedTokenizer) -> None:
    before, after = (sum(len(encoder.encode(text)) for text in CHINESE) for encoder in (merged.old, merged.new))
    assert after < 0.3 * before


def test_a_piece_without_merges_gets_an_intermediate_piece(merged: MergedTokenizer) -> None:
    plan = plan_merge(merged.base, ["意大利"], CHINESE_SCRIPTS)
    assert merged.base.spelled("意大") in plan.intermediates
    assert unreachable(merged.base, plan, merged.base.encoder(plan.steps)) == []


def test_filling_adds_characters_up_to_the_size(merged: MergedTokenizer) -> None:
    plan = plan_merge(merged.base, ["河流"], CHINESE_SCRIPTS)
    size = merged.base.num_tokens + len(plan.steps) + 50
    fill_missing_merges(merged.base, plan, CHINESE_SCRIPTS, size)
    assert merged.base.num_tokens + len(plan.steps) == size
    assert len(plan.filled) == 50
    assert unreachable(merged.base, plan, merged.base.encoder(plan.steps)) == []


def test_added_tokens_keep_their_ids_before_new_pieces(tmp_path: Path) -> None:
    base = load_base(KINDS["llama3"](tmp_path / "base"))
    before = AutoTokenizer.from_pretrained(tmp_path / "base")
    (tmp_path / "out").mkdir()
    base.write(plan_with_learned_pieces(base).steps, tmp_path / "out")
    after = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = list(range(base.num_tokens - 3, base.num_tokens))
    assert after.convert_tokens_to_ids(ADDED) == before.convert_tokens_to_ids(ADDED) == ids
    assert (after.bos_token, after.eos_token) == (ADDED[0], ADDED[1])
    assert after.encode(f"a{ADDED[2]}b", add_special_tokens=False)[1] == after.convert_tokens_to_ids(ADDED[2])
    assert min(after.encode("河", add_special_tokens=False)) >= 0


def test_added_tokens_of_a_sentencepiece_directory_become_its_pieces(tmp_path: Path) -> None:
    folder = KINDS["sentencepiece"](tmp_path / "base")
    (folder / "tokenizer.json").unlink()
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 400}))
    base = load_base(folder)
    assert base.num_tokens == 401
    (tmp_path / "out").mkdir()
    base.write(plan_merge(base, ["河流"], CHINESE_SCRIPTS).steps, tmp_path / "out")
    tokenizer, encoder = AutoTokenizer.from_pretrained(tmp_path / "out"), load_encoder(tmp_path / "out")
    assert tokenizer.convert_tokens_to_ids("<pad>") == encoder.token_id("<pad>") == 400
    assert tokenizer.encode("a<pad>", add_special_tokens=False)[-1] == 400
    assert 400 not in encoder.encode("a<pad>")  # text that spells a special token is text


def test_settings_and_chat_template_of_the_base_are_kept(tmp_path: Path) -> None:
    folder = KINDS["sentencepiece"](tmp_path / "base")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {"add_bos_token": False, "add_eos_token": True, "model_max_length": 4096}
    file.write_text(json.dumps(settings | {"tokenizer_class": "LlamaTokenizer", "legacy": False}))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    base = load_base(folder)
    (tmp_path / "out").mkdir()
    base.write(plan_merge(base, ["河流"], CHINESE_SCRIPTS).steps, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.model_max_length == 4096
    assert tokenizer.chat_template == "{{ messages }}"
    ids = tokenizer.encode("the river")
    assert (ids[0] == tokenizer.bos_token_id, ids[-1] == tokenizer.eos_token_id) == (False, True)


@pytest.mark.parametrize("kind", ["sentencepiece", "llama3"])
def test_unigram_pieces_become_reachable_too(kind: str, tmp_path: Path) -> None:
    base = load_base(KINDS[kind](tmp_path / "base"))
    plan = plan_with_learned_pieces(base, PieceAlgorithm.unigram)
    encoder = base.encoder(plan.steps)
    assert unreachable(base, plan, encoder) == []
    assert any(len(base.text(step.piece) or "") > 2 for step in plan.steps)


RUSSIAN = ["Река течёт к морю, и река глубока. Он сказал: река красива, море сине, река течёт."] * 8


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_pieces_of_a_script_with_spaces_include_the_leading_space(kind: str, tmp_path: Path) -> None:
    base, scripts = load_base(KINDS[kind](tmp_path / "base")), Scripts(["Cyrillic"])
    plan = plan_with_learned_pieces(base, texts=RUSSIAN, scripts=scripts)
    base_encoder, expanded_encoder = base.encoder([]), base.encoder(plan.steps)
    assert " река" in {base.text(step.piece) for step in plan.steps}
    assert unreachable(base, plan, expanded_encoder) == []
    for text in [*ENGLISH, *CHINESE]:
        assert expanded_encoder.encode(text) == base_encoder.encode(text)
    assert expanded_encoder.decode(expanded_encoder.encode(RUSSIAN[0])) == RUSSIAN[0]
    assert len(expanded_encoder.encode(RUSSIAN[0])) < 0.5 * len(base_encoder.encode(RUSSIAN[0]))


def test_intermediates_that_change_old_text_are_dropped(base_tokenizer: Path) -> None:
    base = load_base(base_tokenizer)
    plan = plan_merge(base, ["the年", "年轻", "xyzzy", "年"], CHINESE_SCRIPTS)
    assert [step.piece for step in plan.steps] == ["年", "轻", "年轻"]
    assert plan.dropped["the年"].startswith("reached only by merges that touch other text")
    assert plan.dropped["xyzzy"] == "no character of Han, CJK_Punctuation"


def test_cured_scores_are_distinct_and_uncured_ones_tie(base_tokenizer: Path) -> None:
    for tied in (False, True):
        base = load_base(base_tokenizer, tied=tied)
        steps = plan_merge(base, ["河流", "意大利"], CHINESE_SCRIPTS).steps
        scores = [piece.score for piece in base.merged(steps).pieces[base.num_tokens :]]
        assert (len(set(scores)), max(scores)) == ((1, 0.0) if tied else (len(steps), scores[0]))


def test_more_characters_than_there_are_is_refused(base_tokenizer: Path) -> None:
    base = load_base(base_tokenizer)
    with pytest.raises(UserError, match=r"Han have no more characters. Give a smaller multiple"):
        fill_missing_merges(base, plan_merge(base, ["河流"], CHINESE_SCRIPTS), Scripts(["Han"]), 1_000_000)


def test_a_duplicate_piece_in_a_list_is_refused_with_both_lines(tmp_path: Path) -> None:
    file = tmp_path / "pieces.txt"
    file.write_text("河流\n山川\n河流\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"pieces.txt:3: piece '河流' is already in line 1"):
        read_pieces(file)


def test_pieces_are_read_from_lists_models_and_byte_level_files(tmp_path: Path, merged: MergedTokenizer) -> None:
    file = tmp_path / "pieces.txt"
    file.write_text("\ufeff河流\n\n▁山川 \n", encoding="utf-8")
    assert read_pieces(file) == ["河流", " 山川"]
    name = "tokenizer.model" if (merged.folder / "tokenizer.model").exists() else "tokenizer.json"
    texts = {merged.base.text(step.piece) for step in merged.plan.steps} - {None}
    assert texts <= set(read_pieces(merged.folder / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sp.vocab", "<unk>\t0\n<s>\t0\n▁\t-2.1\n人工智能\t-8.25\n▁大模型\t-9e-1\n"),
        ("jieba.txt", "人工智能 1234 n\n▁大模型 99 nz\n"),
        ("words.txt", "人工智能 1234\n▁大模型 99\n"),
        ("tabs.txt", "人工智能\t1234\tn1\n▁大模型  99.5  nz\n"),
        ("low.vocab", "▁▁\t-1e+09\n人工智能\t-3\n▁大模型\t-4\n"),
        ("vocab.json", '{"▁大模型": 1, "人工智能": 0}'),
        ("gpt2_vocab.json", '{"äººå·¥æĻºèĥ½": 0, "Ġå¤§æ¨¡åŀĭ": 1}'),
    ],
)
def test_pieces_are_the_first_column_of_a_list_and_the_keys_of_a_vocabulary(
    tmp_path: Path, name: str, content: str
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    assert read_pieces(tmp_path / name) == ["人工智能", " 大模型"]


def test_a_line_that_only_looks_like_a_dictionary_is_a_piece(tmp_path: Path) -> None:
    (tmp_path / "pieces.txt").write_text("人工智能 1234 n\n大模型\n", encoding="utf-8")
    assert read_pieces(tmp_path / "pieces.txt") == ["人工智能 1234 n", "大模型"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.model", b"no model", "not a SentencePiece model"),
        ("p.json", b"{}", "not a tokenizer.json"),
        ("p.txt", b"\xff\xfe", "not UTF-8"),
        ("p.txt", b"\n \n", "there is no piece in it"),
        ("p.txt", "大模型 9 n\n人工智能\n互联网 8 n\n".encode(), r"p.txt:2: '人工智能' differs from most lines"),
        ("p.txt", "人工\t智能\n大模型\n".encode(), r"p.txt:1: '人工\\t智能' holds a tab"),
    ],
)
def test_unreadable_lists_are_refused(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_pieces(tmp_path / name)


def test_nothing_is_added_for_a_piece_that_cannot_be_reached(base_tokenizer: Path) -> None:
    plan = plan_merge(load_base(base_tokenizer), ["河the流", "河" * 65], CHINESE_SCRIPTS)
    assert plan.steps == plan.intermediates == []
    assert plan.dropped["河" * 65] == "longer than 64 characters"
