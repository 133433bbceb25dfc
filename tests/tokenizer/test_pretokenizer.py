"""Words of scripts with combining marks become pieces, and text without marks keeps its ids."""

import json
import unicodedata
from pathlib import Path

import pytest
from bases import KINDS, sentencepiece_base
from samples import CHINESE, ENGLISH

from fireflyds.errors import UserError
from fireflyds.tokenizer.base import load_base
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.pretokenizer import has_marks, with_marks
from fireflyds.tokenizer.scripts import Scripts

# Two sentences each, written for these tests: the script, and whether its words are cut at marks.
LANGUAGES = {
    "thai": ("Thai", True, "แม่น้ำไหลผ่านเมืองเก่าและท่าเรือเล็ก ทุกเช้าผู้คนซื้อปลาที่ตลาดใกล้สะพาน"),
    "hindi": ("Devanagari", True, "नदी पुराने शहर और बंदरगाह से होकर बहती है। सुबह लोग पुल के पास मछली खरीदते हैं।"),
    "arabic": ("Arabic", True, "يَجْرِي النَّهْرُ عَبْرَ المَدِينَةِ القَدِيمَةِ. يَشْتَرِي النَّاسُ السَّمَكَ قُرْبَ الجِسْرِ."),
    "korean": ("Hangul", False, "강은 오래된 도시와 항구를 지나 흐른다. 아침마다 사람들은 시장에서 생선을 산다."),
    "japanese": ("Han,Hiragana", False, "川は古い町と小さな港を通って流れる。毎朝人々は橋のそばの市場で魚を買う。"),
    "vietnamese": (
        "Latin",
        True,
        unicodedata.normalize("NFD", "Dòng sông chảy qua thành phố cổ. Mỗi sáng người ta mua cá."),
    ),
    "uyghur": ("Arabic", False, "دەريا كونا شەھەر ۋە پورتتىن ئېقىپ ئۆتىدۇ. كىشىلەر بازاردا بېلىق ئالىدۇ."),
}


def expand(verb, folder: Path, name: str, *options: str) -> dict:
    script, _, text = LANGUAGES[name]
    words = text.split(" ")
    lines = [" ".join(words[number % len(words) :] + words[: number % len(words)]) for number in range(60)]
    (folder / "text.txt").write_text("\n".join(lines), encoding="utf-8")
    verb(
        "expand", f"base={folder / 'base'}", "corpus=text.txt", f"scripts=[{script}]", "num_pieces=160", "min_count=2",
        "vocab_multiple=1", "max_piece_length=12", f"out={folder / 'out'}", *options,
    )  # fmt: skip
    return json.loads((folder / "out" / "report.json").read_text())


# One that is cut into words, one that is not, and one written from right to left; the others take 5 s each.
FAST = ("arabic", "japanese", "thai")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in sorted(LANGUAGES)]
)
def test_words_with_marks_become_pieces(name: str, verb, tmp_path: Path) -> None:
    KINDS["llama3"](tmp_path / "base")
    before = load_encoder(tmp_path / "base")
    text = LANGUAGES[name][2]
    plain = expand(verb, tmp_path, name)
    num_plain = len(load_encoder(tmp_path / "out").encode(text))
    is_cut = LANGUAGES[name][1]
    assert (plain["cut_by_marks"]["cut"] > 0) == is_cut
    report = expand(verb, tmp_path, name, "pretokenizer=marks")
    encoder = load_encoder(tmp_path / "out")
    assert encoder.decode(encoder.encode(text)) == text
    assert len(encoder.encode(text)) < num_plain if is_cut else len(encoder.encode(text)) == num_plain
    assert num_plain < len(before.encode(text))
    assert all(check["failed"] == 0 for check in report["checks"])
    scripts = Scripts(LANGUAGES[name][0].split(","))
    for line in (line for line in [*ENGLISH, *CHINESE] if not scripts.has(line)):
        assert not has_marks(line)
        assert encoder.encode(line) == before.encode(line)


def test_expressions_take_marks_into_words() -> None:
    words = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    split = {"type": "Split", "pattern": {"Regex": words}, "behavior": "Isolated", "invert": False}
    changed = with_marks({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, {"type": "Other"}]}})
    assert changed is not None
    expected = r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    assert changed["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] == expected
    assert with_marks(changed) is None
    assert with_marks({"pre_tokenizer": None}) is None


def test_a_base_that_cuts_no_words_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="SentencePiece cuts no words at combining marks"):
        load_base(sentencepiece_base(tmp_path / "base"), marks=True)
