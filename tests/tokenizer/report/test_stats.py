"""Sizes of texts under two tokenizers, by domain and language."""

import pytest
from samples import CHINESE, ENGLISH

from fireflyds.tokenizer.base import load_base
from fireflyds.tokenizer.report.page import format_comparison
from fireflyds.tokenizer.report.stats import compare_tokenizers, language
from fireflyds.tokenizer.scripts import Scripts
from fireflyds.tokenizer.vocabulary_merge import plan_merge


@pytest.mark.parametrize(
    ("text", "expected"),
    [("河流 and 山川很多", "Chinese"), ("the 河 river", "Latin script"), ("東京はとても大きい都市です", "Japanese"),
     ("안녕하세요", "Korean"), ("река и море", "Cyrillic script"), ("123 ...", "no letters")],
)  # fmt: skip
def test_language_is_detected_from_the_script(text: str, expected: str) -> None:
    assert language(text) == expected


def test_comparison_is_counted_by_domain_and_language(base_tokenizer) -> None:
    base = load_base(base_tokenizer)
    base_encoder, expanded_encoder = (
        base.encoder([]),
        base.encoder(plan_merge(base, list(set("".join(CHINESE))), Scripts(["Han"])).steps),
    )
    texts = [("news", CHINESE[0]), ("news", CHINESE[1]), ("news", ENGLISH[0]), ("web", CHINESE[2])]
    rows = compare_tokenizers(base_encoder, expanded_encoder, texts)
    num_documents = {(row.domain, row.language): row.before.documents for row in rows}
    assert num_documents == {
        ("news", "Chinese"): 2,
        ("news", "Latin script"): 1,
        ("web", "Chinese"): 1,
        ("all", "all"): 4,
    }
    chinese = next(row for row in rows if row.domain == "web")
    assert chinese.before.characters == len(CHINESE[2])
    assert chinese.before.num_bytes == len(CHINESE[2].encode())
    assert chinese.before.tokens == len(base_encoder.encode(CHINESE[2]))
    # Every Chinese character but the dummy prefix was three byte tokens, and is one piece now.
    assert chinese.before.as_dict()["byte_fallback_rate"] > 0.9
    assert chinese.after.fallback == 3 * sum(c in "，。" for c in CHINESE[2])
    assert rows[-1].after.tokens == sum(len(expanded_encoder.encode(text)) for _, text in texts)
    assert rows[-1].as_dict()["after"]["characters_in_context"] == pytest.approx(
        4096 * rows[-1].after.characters / rows[-1].after.tokens
    )
    table = "\n".join(format_comparison([row.as_dict() for row in rows], ("a", "b")))
    assert f"{chinese.before.tokens:,} → {chinese.after.tokens:,}" in table


def test_no_texts_give_no_rows(base_tokenizer) -> None:
    encoder = load_base(base_tokenizer).encoder([])
    assert compare_tokenizers(encoder, encoder, []) == []
