"""Packing and mixing: every token exactly once, no label across documents, the same rows for all world sizes."""

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireflyds.config import DataConfig, PhaseConfig, SourceConfig
from fireflyds.data.encode import turn_prompt
from fireflyds.data.pack.loader import PackedLoader, collate
from fireflyds.data.pack.mixture import PackedRowSampler
from fireflyds.data.pack.packing import DocumentSlices, best_fit, plan_rows, slice_ids, split_documents
from fireflyds.data.store.store import TokenStore
from fireflyds.errors import UserError
from fireflyds.testing.stores import write_store
from fireflyds.types import IGNORE_INDEX, Example

SEQ = 64


def make_store(folder: Path, num_docs: int = 300, dialogues: bool = False, seed: int = 0) -> TokenStore:
    """Documents of unique tokens, so that a token identifies its document and position."""
    rng = np.random.default_rng(seed)
    domains: dict[str, list[Example]] = {"en": [], "zh": []}
    next_token = 10
    for number in range(num_docs):
        length = int(rng.integers(2, 150))
        ids = np.arange(next_token, next_token + length)
        next_token += length
        answer_start = int(rng.integers(1, length))
        spans = ((answer_start, length),) if dialogues else ((0, length),)
        domains["zh" if number % 3 else "en"].append(Example(ids, spans, length, is_document=not dialogues))
    return write_store(folder, domains)


def data_config(**options) -> DataConfig:
    return DataConfig(**options)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("store") / "s")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, SEQ), min_size=1, max_size=200), st.integers(0, 5), st.integers(0, 3))
def test_every_piece_is_in_exactly_one_row_and_no_row_is_too_long(lengths: list[int], seed: int, epoch: int) -> None:
    sizes = np.array(lengths)
    plan = plan_rows(sizes, SEQ, seed, epoch)
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    assert all(0 < sizes[plan.row(i)].sum() <= SEQ for i in range(len(plan)))
    assert len(plan) == len(plan_rows(sizes, SEQ, seed, 0))


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(1, SEQ, 20_000)
    plan = plan_rows(lengths, SEQ, 0, 0)
    assert lengths.sum() / (len(plan) * SEQ) > 0.99


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, SEQ), min_size=1, max_size=120))
def test_packing_is_best_fit_decreasing(lengths: list[int]) -> None:
    free_space: list[int] = []
    for length in sorted(lengths, reverse=True):
        candidates = [space for space in free_space if space >= length]
        if candidates:
            free_space.remove(min(candidates))
            free_space.append(min(candidates) - length)
        else:
            free_space.append(SEQ - length)
    row_of, num_rows = best_fit(np.array(lengths), SEQ)
    assert num_rows == len(free_space)
    remaining_space = SEQ - np.bincount(row_of, weights=np.array(lengths), minlength=num_rows)
    assert sorted(remaining_space.tolist()) == sorted(free_space)


def test_epochs_have_different_orders_and_seeds_repeat() -> None:
    lengths = np.arange(1, 50)
    assert plan_rows(lengths, SEQ, 0, 0).order.tolist() == plan_rows(lengths, SEQ, 0, 0).order.tolist()
    assert plan_rows(lengths, SEQ, 0, 0).order.tolist() != plan_rows(lengths, SEQ, 0, 1).order.tolist()


def test_an_epoch_learns_every_token_but_the_first_of_each_document(store: TokenStore) -> None:
    rows = PackedRowSampler(store, SEQ, 0, data_config())
    targets = Counter()
    for number in range(rows.rows_per_epoch):
        labels = collate(store, rows.row(number)).labels[0].numpy()
        targets.update(labels[labels != IGNORE_INDEX].tolist())
    ids = [store.ids(document, 0, length) for document, length in enumerate(store.lengths.tolist())]
    assert set(targets) == {int(token) for tokens in ids for token in tokens[1:]}
    assert set(targets.values()) == {1}


def test_no_label_crosses_a_document(store: TokenStore) -> None:
    rows = PackedRowSampler(store, SEQ, 0, data_config())
    for number in range(50):
        batch = collate(store, DocumentSlices.concatenate([rows.row(number), rows.row(number + 1)]))
        ids, labels, positions = batch.input_ids[0].numpy(), batch.labels[0].numpy(), batch.position_ids[0].numpy()
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            assert positions[start:end].tolist() == list(range(end - start))
            assert labels[end - 1] == IGNORE_INDEX
            assert labels[start : end - 1].tolist() == ids[start + 1 : end].tolist()
        assert batch.num_learned == (labels != IGNORE_INDEX).sum() > 0
        assert batch.max_seqlen == batch.cu_seqlens.diff().max()


def dialogue_of(ids: np.ndarray, spans: Sequence[tuple[int, int]], prompts: Sequence[np.ndarray]) -> Example:
    turn_prompts = (turn_prompt(ids, span[0], prompt) for span, prompt in zip(spans, prompts, strict=True))
    return Example(ids, tuple(spans), 9, prompts=tuple(turn_prompts))


def random_dialogues(rng: np.random.Generator, count: int, *, prompts: bool) -> list[Example]:
    """Dialogues of unique tokens: system message, then questions and answers of all lengths. Prompts, of tokens from
    1,000,000, are those of the system message and the question."""
    examples, next_token = [], 10
    for _ in range(count):
        position, spans, prompt_ids = int(rng.integers(1, 12)), [], []
        head = position
        for turn in range(int(rng.integers(1, 9))):
            question, answer = (int(2 ** rng.uniform(0, top)) for top in (6.5, 8))
            prompt_ids.append(1_000_000 + np.arange(head + question) if turn and prompts else np.zeros(0, np.uint32))
            spans.append((position + question, position + question + answer))
            position += question + answer
        examples.append(dialogue_of(np.arange(next_token, next_token + position), spans, prompt_ids))
        next_token += position
    return examples


@pytest.mark.parametrize("prompts", [True, False])
@pytest.mark.parametrize("seq_len", [8, 40, 64, 200])
def test_every_learned_token_of_a_dialogue_is_a_target_once(tmp_path: Path, seq_len: int, prompts: bool) -> None:
    examples = random_dialogues(np.random.default_rng(seq_len), 120, prompts=prompts)
    dialogue_store = write_store(tmp_path / "s", {"zh": examples}, 2_000_000)
    slices = split_documents(dialogue_store, np.arange(len(dialogue_store)), seq_len)
    assert slices.lengths.max() <= seq_len
    assert slices.num_continued == int((dialogue_store.lengths > seq_len).sum()) > 0
    targets = Counter()
    for index in range(len(slices)):
        batch = collate(dialogue_store, slices.take(np.array([index])))
        labels, ids = batch.labels[0].numpy(), batch.input_ids[0].numpy()
        assert labels[-1] == IGNORE_INDEX
        learned = labels[:-1] != IGNORE_INDEX
        assert (labels[:-1][learned] == ids[1:][learned]).all()
        targets.update(labels[labels != IGNORE_INDEX].tolist())
    spans = [(example, span) for example in examples for span in example.spans]
    assert targets == Counter(token for example, span in spans for token in example.input_ids[slice(*span)].tolist())


def test_a_dialogue_goes_on_at_a_turn_with_its_prompt(tmp_path: Path) -> None:
    """A system message of 2 tokens, then questions and answers of 3 each."""
    spans = tuple((5 + 6 * turn, 8 + 6 * turn) for turn in range(4))
    prompts = (np.zeros(0, np.uint32), *(np.array([100, 101, 200 + turn, 201, 202]) for turn in range(1, 4)))
    dialogue_store = write_store(tmp_path / "s", {"zh": [dialogue_of(np.arange(26), spans, prompts)]}, 400)
    slices = split_documents(dialogue_store, np.arange(1), 12)
    assert [slice_ids(dialogue_store, *location).tolist() for location in slices.as_tuples()] == [
        list(range(8)),
        [100, 101, 201, 201, 202, 11, 12, 13],
        [100, 101, 202, 201, 202, 17, 18, 19],
        [100, 101, 203, 201, 202, 23, 24, 25],
    ]
    assert split_documents(dialogue_store, np.arange(1), 14).lengths.tolist() == [14, 14]
    assert (slices.num_continued, slices.num_cut_tokens) == (1, 0)


def test_an_answer_longer_than_a_row_keeps_the_end_of_its_prompt(tmp_path: Path) -> None:
    prompts = (np.zeros(0, np.uint32), np.arange(300, 310))
    dialogue = dialogue_of(np.arange(60), ((6, 10), (16, 60)), prompts)
    dialogue_store = write_store(tmp_path / "s", {"zh": [dialogue]}, 400)
    slices = split_documents(dialogue_store, np.arange(1), 16)
    ids = [slice_ids(dialogue_store, *location).tolist() for location in slices.as_tuples()]
    assert ids[:3] == [list(range(10)), [*range(302, 310), *range(16, 24)], list(range(23, 39))]
    assert ids[-1][-1] == 59
    assert slices.num_cut_tokens == 2


@pytest.mark.parametrize("weights", [{}, {"zh": 0.75, "en": 0.25}])
def test_the_batch_sequence_is_the_same_for_all_world_sizes(store: TokenStore, weights: dict[str, float]) -> None:
    def tokens_of_step(world: int, micro: int, step: int) -> list[int]:
        rows = PackedRowSampler(store, SEQ, 7, data_config(weights=weights))
        loaders = [PackedLoader(store, rows, micro, 8, rank, world) for rank in range(world)]
        per_rank = [loader.step(step) for loader in loaders]
        return sorted(token for batches in per_rank for batch in batches for token in batch.input_ids[0].tolist())

    for step in (0, 3, 40):  # 40 is beyond the first epoch
        expected = tokens_of_step(1, 8, step)
        assert len(expected) > 100
        for world, micro in ((1, 1), (2, 2), (4, 1), (8, 1)):
            assert tokens_of_step(world, micro, step) == expected


def tokens_by_pool(rows: PackedRowSampler, first: int, end: int) -> np.ndarray:
    tokens = np.zeros(len(rows.pools))
    for number in range(first, end):
        tokens[rows.locate(number)[0]] += int(rows.row(number).lengths.sum())
    return tokens


@pytest.mark.parametrize("first", [0, 137, 5_000])
def test_mixture_counts_tokens_over_any_thousand_rows(store: TokenStore, first: int) -> None:
    rows = PackedRowSampler(store, SEQ, 0, data_config(weights={"zh": 3.0, "en": 1.0}))
    tokens = tokens_by_pool(rows, first, first + 1000)
    assert abs(tokens[0] / tokens.sum() - 0.75) < 0.005


def test_every_pool_is_read_in_order_and_without_gaps(store: TokenStore) -> None:
    rows = PackedRowSampler(store, SEQ, 0, data_config(weights={"zh": 5.0, "en": 1.0}))
    rows_read = {0: 0, 1: 0}
    for number in range(25_000):  # beyond two blocks
        pool, index_in_pool = rows.locate(number)
        assert index_in_pool == rows_read[pool]
        rows_read[pool] += 1
    assert rows.phases[0].counts(25_000).tolist() == [rows_read[0], rows_read[1]]


def test_a_domain_at_its_epoch_limit_leaves_its_share_to_the_others(store: TokenStore) -> None:
    rows = PackedRowSampler(store, SEQ, 0, data_config(weights={"zh": 1.0, "en": 1.0}, max_epochs={"en": 2.0}))
    limit = 2 * rows.pools[1].rows_per_epoch
    pools = [rows.locate(number)[0] for number in range(20 * limit)]
    assert sum(pools) == limit
    assert set(pools[-100:]) == {0}
    assert rows.num_rows is None
    limited_rows = PackedRowSampler(
        store, SEQ, 0, data_config(weights={"zh": 1.0, "en": 1.0}, max_epochs={"en": 1.0, "zh": 1.5})
    )
    assert limited_rows.num_rows == limited_rows.pools[1].rows_per_epoch + int(
        1.5 * limited_rows.pools[0].rows_per_epoch
    )
    limited_rows.row(limited_rows.num_rows - 1)
    with pytest.raises(UserError, match=r"data.max_epochs: the data provide"):
        limited_rows.row(limited_rows.num_rows)


def test_a_curriculum_changes_the_weights_at_its_token_count(store: TokenStore) -> None:
    phases = [PhaseConfig(tokens=20_000, weights={"zh": 9.0, "en": 1.0})]
    rows = PackedRowSampler(store, SEQ, 0, data_config(weights={"zh": 1.0, "en": 1.0}, curriculum=phases))
    phase_start = rows.phases[1].first_row
    tokens_before, tokens_after = (
        tokens_by_pool(rows, 0, phase_start),
        tokens_by_pool(rows, phase_start, phase_start + 1000),
    )
    assert abs(tokens_before.sum() - 20_000) < 2 * SEQ
    assert abs(tokens_before[0] / tokens_before.sum() - 0.5) < 0.02
    assert abs(tokens_after[0] / tokens_after.sum() - 0.9) < 0.005


def test_weights_of_the_sources_are_the_default_in_training(tmp_path: Path) -> None:
    token_store = make_store(tmp_path / "s")
    manifest = json.loads((token_store.path / "manifest.json").read_text()) | {"weights": {"zh": 1.0, "en": 1.0}}
    (token_store.path / "manifest.json").write_text(json.dumps(manifest))
    phases = [PhaseConfig(tokens=5_000, weights={"zh": 9.0, "en": 1.0})]
    rows = PackedRowSampler(
        TokenStore(token_store.path), SEQ, 0, data_config(curriculum=phases, max_epochs={"en": 5.0})
    )
    assert rows.names == ["zh", "en"]
    assert PackedRowSampler(TokenStore(token_store.path), SEQ, 0, data_config(weights={"en": 1.0})).names == ["en"]
    sources = [SourceConfig(path="x", domain="en", weight=0.5), SourceConfig(path="y", domain="en", weight=0.25)]
    assert data_config(sources=sources).shares == {"en": 0.75}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": {"zh": 1.0}, "max_epochs": {"zh": 0.001}}, "data.max_epochs.zh=0.001: less than one of its"),
        ({"max_epochs": {"zh": 1.0}}, "data.max_epochs.zh: limits a domain that is mixed by weight"),
        (
            {"weights": {"zh": 1.0}, "curriculum": [PhaseConfig(tokens=5, weights={"en": 1.0})]},
            "Name the same domains in all",
        ),
    ],
)
def test_inconsistent_mixtures_are_refused(store: TokenStore, options, message: str) -> None:
    with pytest.raises(UserError, match=message):
        PackedRowSampler(store, SEQ, 0, data_config(**options))


def test_an_epoch_ends_when_every_pool_was_read_or_has_reached_its_limit(store: TokenStore) -> None:
    weights = {"zh": 1.0, "en": 1.0}
    rows = PackedRowSampler(store, SEQ, 0, data_config(weights=weights, max_epochs={"en": 1.0, "zh": 1.0}))
    assert rows.rows_per_epoch == rows.num_rows == sum(pool.rows_per_epoch for pool in rows.pools)
    unlimited_rows = PackedRowSampler(store, SEQ, 0, data_config(weights=weights))
    row_counts = unlimited_rows.phases[0].counts(unlimited_rows.rows_per_epoch)
    assert row_counts[0] == unlimited_rows.pools[0].rows_per_epoch
    assert row_counts[1] >= unlimited_rows.pools[1].rows_per_epoch


def test_plans_are_cached_and_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    token_store = make_store(tmp_path / "s")
    expected = [PackedRowSampler(token_store, SEQ, 0, data_config()).row(number).as_tuples() for number in range(200)]
    monkeypatch.setattr("fireflyds.data.pack.mixture.plan_rows", None)
    monkeypatch.setattr("fireflyds.data.pack.mixture.split_documents", None)
    assert [
        PackedRowSampler(TokenStore(token_store.path), SEQ, 0, data_config()).row(number).as_tuples()
        for number in range(200)
    ] == expected


def test_long_documents_are_cut_at_the_end_of_a_sentence(tmp_path: Path) -> None:
    ids = np.full(200, 3)
    ids[[50, 100, 149]] = 7
    token_store = write_store(tmp_path / "s", {"zh": [Example(ids, ((0, 200),), 200, is_document=True)]})
    pieces = split_documents(token_store, np.array([0]), SEQ)
    ends = (pieces.starts + pieces.lengths).tolist()
    assert ends[:2] == [51, 101]
    assert ends[-1] == 200
    assert (pieces.starts[1:] == np.array(ends[:-1]) - 1).all()
    assert (pieces.lengths <= SEQ).all()


def test_prefetched_steps_equal_the_steps(store: TokenStore) -> None:
    loader = PackedLoader(store, PackedRowSampler(store, SEQ, 0, data_config()), 2, 4, 0, 1)
    for number, batches in zip(range(3, 9), loader.steps(3, 9), strict=True):
        for prefetched, batch in zip(batches, loader.step(number), strict=True):
            assert prefetched.input_ids.tolist() == batch.input_ids.tolist()
    steps = loader.steps(0, 1000)
    next(steps)
    steps.close()  # must end the prefetch thread
    with pytest.raises(UserError, match="max_epochs"):
        list(
            PackedLoader(
                store,
                PackedRowSampler(store, SEQ, 0, data_config(weights={"zh": 1.0}, max_epochs={"zh": 1.0})),
                2,
                4,
                0,
                1,
            ).steps(0, 10**6)
        )


def test_insufficient_data_are_the_same_error_on_every_rank(store: TokenStore) -> None:
    rows = PackedRowSampler(store, SEQ, 0, data_config(weights={"zh": 1.0}, max_epochs={"zh": 1.0}))
    steps = rows.num_rows // 4
    for rank in (0, 1):
        loader = PackedLoader(store, rows, 2, 4, rank, 2)
        loader.require(steps)
        with pytest.raises(UserError, match=f"the data provide {rows.num_rows} rows, the run needs {4 * (steps + 1)}"):
            loader.require(steps + 1)


def test_unknown_domain_lists_the_known_ones(store: TokenStore) -> None:
    with pytest.raises(UserError, match=r"data.weights.fr: .* It has: en, zh"):
        PackedRowSampler(store, SEQ, 0, data_config(weights={"fr": 1.0}))


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    store_path = make_store(tmp_path / "d", 5).path
    file = next((store_path / "parts").glob("*.ids"))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="Prepare it again"):
        TokenStore(store_path)
    (store_path / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no token store there \(manifest.json is missing\)"):
        TokenStore(store_path)
