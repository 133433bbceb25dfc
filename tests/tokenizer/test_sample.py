"""A sample is bounded, even, and the same for the same seed."""

from fireflyds.tokenizer.sample import draw_sample, lines


def test_a_small_corpus_is_sampled_completely_with_a_twentieth_held_out() -> None:
    texts = [f"第{number}行" for number in range(100)]
    sample = draw_sample(texts, characters=10_000, seed=1)
    assert len(sample.held_out) == 5
    assert sorted([*sample.learn, *sample.held_out]) == sorted(texts)
    assert sample.characters == sample.characters_read == sum(map(len, texts))


def test_a_large_corpus_is_sampled_evenly_within_the_bound() -> None:
    texts = (f"{number:08d}" for number in range(20_000))
    sample = draw_sample(texts, characters=16_000, seed=1)
    assert sample.characters_read == 160_000
    assert 15_900 <= sample.characters <= 16_000
    sampled_indices = [int(line) for line in [*sample.learn, *sample.held_out]]
    assert abs(sum(sampled_indices) / len(sampled_indices) - 10_000) < 500
    assert sample == draw_sample((f"{number:08d}" for number in range(20_000)), characters=16_000, seed=1)
    assert sample != draw_sample((f"{number:08d}" for number in range(20_000)), characters=16_000, seed=2)


def test_lines_longer_than_the_limit_of_the_trainer_are_split() -> None:
    assert [len(line) for line in lines(["字" * 2500 + "\n短"])] == [1000, 1000, 500, 1]


def test_a_corpus_of_one_line_is_learned_from_and_held_out() -> None:
    sample = draw_sample(["一行"], characters=1000, seed=1)
    assert sample.learn == sample.held_out == ["一行"]
