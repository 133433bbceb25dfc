"""Characters of Unicode scripts, and the words that pieces are learned from."""

import pytest

from fireflyds.errors import UserError
from fireflyds.tokenizer.scripts import Scripts


def test_words_end_at_punctuation_digits_and_other_scripts() -> None:
    words = Scripts(["Han", "CJK_Punctuation"]).words("2017年，我爱abc你。“好”々〇！")
    assert words == ["年", "，", "我爱", "你", "。", "好", "々〇", "！"]


def test_words_of_scripts_with_spaces_keep_the_space_before_them() -> None:
    assert Scripts(["Cyrillic"]).words("Он: привет, мир 中") == ["Он", " привет", " мир"]
    assert Scripts(["Hangul", "Han"]).words("안녕 세계 中文") == ["안녕", " 세계", "中文"]
    assert Scripts(["Hiragana", "Katakana"]).words("タワーはい") == ["タワーはい"]


def test_punctuation_used_in_english_does_not_belong_to_the_script() -> None:
    scripts = Scripts(["Han", "CJK_Punctuation"])
    assert not scripts.has("“quotes” — dash… café · naïve")
    assert scripts.covers("。，、～（）　Ａ")


@pytest.mark.parametrize(
    ("lead", "safe"),
    [(b"\xe4\xbd", True), (b"\xe5", True), (b"\xe3\x80", True), (b"\xef\xbc", True),
     (b"\xe4", False), (b"\xe3", False), (b"\xe2\x80", False), (b"\xbd\xa0", False), (b"a", False), (b"", False)],
)  # fmt: skip
def test_lead_bytes_are_covered_only_if_all_their_characters_are(lead: bytes, safe: bool) -> None:
    assert Scripts(["Han", "CJK_Punctuation"]).covers_lead(lead) is safe


def test_characters_are_unique_and_ordered_by_frequency() -> None:
    characters = list(Scripts(["Han"]).characters())
    assert characters[0] == "啊"
    assert len(characters) == len(set(characters)) > 90_000
    assert "\uf900" not in characters
    assert "鿿" in characters


def test_unknown_and_missing_scripts_are_refused() -> None:
    with pytest.raises(UserError, match="'Klingon' is no Unicode script. Give names like Han"):
        Scripts(["Klingon"])
    with pytest.raises(UserError, match="at least one script"):
        Scripts([])


def test_a_script_of_punctuation_has_characters() -> None:
    marks = list(Scripts(["CJK_Punctuation"]).characters())
    assert {"。", "，", "！"} <= set(marks)
    assert Scripts(["CJK_Punctuation"]).has("\u2329")  # normalisation makes it U+3008
