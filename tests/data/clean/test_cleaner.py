"""Every cleaning step and its option, duplicates and contamination."""

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from fireflyds.config import CleanConfig, UnicodeForm
from fireflyds.data.clean.cleaner import Cleaner, contamination, repetition, run_hashes
from fireflyds.data.clean.duplicates import NUM_PERM, banded, exact_duplicates, near_duplicates, signature
from fireflyds.errors import UserError
from fireflyds.types import Message, Sample


def cleaned(text: str, **options) -> str | None:
    result = Cleaner(CleanConfig(**options)).clean(Sample(text=text))
    return result.text if isinstance(result, Sample) else f"dropped: {result}"


@pytest.mark.parametrize(
    ("text", "options", "expected"),
    [
        ("ＡＢＣ　１２３，。", {}, "ＡＢＣ　１２３，。"),
        ("ＡＢＣ　１２３，。", {"width": True}, "ABC 123，。"),
        ("Ａ，ﬁ", {"unicode": UnicodeForm.nfkc}, "A,fi"),
        ("e\u0301 \uf900", {"unicode": UnicodeForm.nfc}, "é \u8c48"),
        ("漢語與軟體", {"simplify": True}, "汉语与软体"),
        (
            "正文第一段。\n责任编辑：张三\n版权所有 未经许可不得转载\n正文第二段。",
            {"boilerplate": True},
            "正文第一段。\n正文第二段。",
        ),
        ("首页\n登录", {"boilerplate": True}, "dropped: boilerplate"),
        ("短", {"min_characters": 2}, "dropped: too short"),
        ("同一行。\n" * 20, {"max_repetition": 0.5}, "dropped: repetition"),
        (
            "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。",
            {"max_repetition": 0.5},
            "白日依山尽，黄河入海流。\n欲穷千里目，更上一层楼。",
        ),
    ],
)
def test_a_step_does_what_its_option_says(text: str, options: dict, expected: str) -> None:
    assert cleaned(text, **options) == expected


def test_dialogues_are_cleaned_turn_by_turn_and_not_dropped_for_length() -> None:
    cleaner = Cleaner(CleanConfig(simplify=True, min_characters=100))
    dialogue = cleaner.clean(Sample(messages=(Message("user", "漢"), Message("assistant", "語"))))
    assert isinstance(dialogue, Sample)
    assert [message.content for message in dialogue.messages] == ["汉", "语"]


def test_repetition_is_a_fraction() -> None:
    assert repetition("一\n一\n一\n一") == pytest.approx(0.75)
    assert repetition("没有重复的一行文字") == 0.0


def test_documents_that_share_a_run_with_an_evaluation_set_are_dropped(tmp_path: Path) -> None:
    question = "下列关于青岭镇特产的说法中，哪一项是正确的并且符合历史事实？"
    (tmp_path / "test.csv").write_text(f"Question,A,B\n{question},茶叶,蜂蜜\n", encoding="utf-8")
    options = {"decontaminate": [str(tmp_path / "test.csv")], "overlap": 13}
    contaminated_text = "论坛转载：下列关于青岭镇特产的说法中， 哪一项是正确的，并且符合历史事实？答案是蜂蜜。"
    assert cleaned(contaminated_text, **options) == "dropped: contaminated"
    assert cleaned("青岭镇的特产是蜂蜜，这是正确的。", **options) == "青岭镇的特产是蜂蜜，这是正确的。"
    dialogue = Sample(messages=(Message("user", contaminated_text), Message("assistant", "蜂蜜")))
    assert Cleaner(CleanConfig(**options)).clean(dialogue) == "contaminated"
    with pytest.raises(UserError, match="no such file"):
        contamination(CleanConfig(decontaminate=["nothing.csv"]))


def test_run_hashes_depend_on_the_characters_of_the_run_alone() -> None:
    first, second = run_hashes("甲乙丙丁戊己", 4), run_hashes("子乙丙丁，戊 丑", 4)
    assert len(first) == 3
    assert first[1] == second[1]
    assert len(np.intersect1d(first, second)) == 1
    assert len(run_hashes("短", 4)) == 0


def test_exact_copies_after_the_first_are_dropped() -> None:
    assert exact_duplicates(np.array([5, 3, 5, 5, 3], np.uint64)).tolist() == [False, False, True, True, True]


def perturbed(text: str, num_changes: int, rng: np.random.Generator) -> str:
    characters = list(text)
    for index in rng.choice(len(text), num_changes, replace=False):
        characters[index] = chr(int(rng.integers(0x4E00, 0x9FA5)))
    return "".join(characters)


def jaccard(a: str, b: str) -> float:
    first, second = ({text[start : start + 5] for start in range(len(text) - 4)} for text in (a, b))
    return len(first & second) / len(first | second)


def test_near_duplicates_are_found_and_others_kept() -> None:
    rng = np.random.default_rng(0)
    originals = ["".join(map(chr, rng.integers(0x4E00, 0x4E00 + 3000, 400))) for _ in range(300)]
    copies = [perturbed(text, 8, rng) for text in originals[:100]]
    assert min(jaccard(a, b) for a, b in zip(originals, copies, strict=False)) >= 0.8
    half_copies = [text[:200] + "".join(map(chr, rng.integers(0x4E00, 0x9FA5, 200))) for text in originals[100:200]]
    signatures = np.array([signature(text) for text in originals + copies + half_copies], np.uint32)
    is_duplicate = near_duplicates(banded([signatures], len(signatures)), 0.8)
    assert not is_duplicate[:300].any()
    assert is_duplicate[300:400].mean() >= 0.95
    assert not is_duplicate[400:].any()


def test_near_duplicates_of_one_page_are_found_in_memory_that_grows_with_the_documents() -> None:
    """8,000 copies of one boilerplate page, each with two numbers of its own: nearly all pairs share a band."""
    rng = np.random.default_rng(0)
    page = rng.integers(0, 1 << 32, NUM_PERM, dtype=np.uint32)
    signatures = np.tile(page, (8_000, 1))
    changed_columns = rng.integers(0, NUM_PERM, (8_000, 2))
    signatures[np.arange(8_000)[:, None], changed_columns] = rng.integers(0, 1 << 32, (8_000, 2), dtype=np.uint32)
    tracemalloc.start()
    is_duplicate = near_duplicates(banded([signatures], len(signatures)), 0.8)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert is_duplicate.tolist() == [False] + [True] * 7_999
    assert peak < 4 * signatures.nbytes


def test_near_duplicates_equal_those_of_a_pairwise_comparison_in_order() -> None:
    rng = np.random.default_rng(1)
    pages = rng.integers(0, 1 << 32, (40, NUM_PERM), dtype=np.uint32)
    signatures = pages[rng.integers(0, 40, 400)]
    is_replaced = rng.random(signatures.shape) < rng.choice([0.0, 0.1, 0.2, 0.4], (400, 1))
    signatures = np.where(is_replaced, rng.integers(0, 1 << 32, signatures.shape, dtype=np.uint32), signatures)
    min_similarity = 0.8 - 2 * np.sqrt(0.8 * 0.2 / NUM_PERM)
    bands = [
        {(band, tuple(row[band * 8 : band * 8 + 8])) for band in range(NUM_PERM // 8)} for row in signatures.tolist()
    ]
    expected = np.zeros(400, bool)
    for first in range(400):
        for second in range(first + 1, 400):
            if not expected[first] and not expected[second] and bands[first] & bands[second]:
                expected[second] = (signatures[first] == signatures[second]).mean() >= min_similarity
    assert 0 < expected.sum() < 399
    assert near_duplicates(banded([signatures], len(signatures)), 0.8).tolist() == expected.tolist()
