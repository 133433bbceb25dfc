"""Packing and mixing: nothing lost, nothing twice, no label across documents, the same rows for all world sizes."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireflyds.config import DataConfig, PhaseConfig, SourceConfig
from fireflyds.data.pack.loader import PackedLoader, collate
from fireflyds.data.pack.mixture import PackedRowSampler
from fireflyds.data.pack.packing import DocumentSlices, best_fit, plan_rows, split_documents
from fireflyds.data.store.store import TokenStore
from fireflyds.errors import UserError
from fireflyds.testing.stores import write_store
from fireflyds.types import IGNORE_INDEX, Example

SEQ = 64


def make_store(folder: Path, num_docs: int = 300, dialogues: bool = False, seed: int = 0) -> TokenStore:
    """Documents whose every token is unique, so that where a token came from can be read off it."""
    rng = np.random.default_rng(seed)
    domains: dict[str, list[Example]] = {"en": [], "zh": []}
    at = 10
    for number in range(num_docs):
        length = int(rng.integers(2, 150))
        ids = np.arange(at, at + length)
        at += length
        middle = int(rng.integers(1, length))
        spans = ((middle, length),) if dialogues else ((0, length),)
        domains["zh" if number % 3 else "en"].append(Example(ids, spans, length, is_document=not dialogues))
    return write_store(folder, domains)


def data(**options) -> DataConfig:
    return DataConfig(**options)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("store") / "s")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, SEQ), min_size=1, max_size=200), st.integers(0, 5), st.integers(0, 3))
def test_every_piece_is_in_exactly_one_row_and_no_row_is_too_long(lengths: list[int], seed: int, epoch: int) -> None:
    sizes = np.array(lengths)
    made = plan_rows(sizes, SEQ, seed, epoch)
    assert sorted(made.order.tolist()) == list(range(len(lengths)))
    assert all(0 < sizes[made.row(i)].sum() <= SEQ for i in range(len(made)))
    assert len(made) == len(plan_rows(sizes, SEQ, seed, 0))


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(1, SEQ, 20_000)
    made = plan_rows(lengths, SEQ, 0, 0)
    assert lengths.sum() / (len(made) * SEQ) > 0.99


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, SEQ), min_size=1, max_size=120))
def test_packing_is_best_fit_decreasing(lengths: list[int]) -> None:
    free: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in free if room >= length]
        if fitting:
            free.remove(min(fitting))
            free.append(min(fitting) - length)
        else:
            free.append(SEQ - length)
    row_of, num_rows = best_fit(np.array(lengths), SEQ)
    assert num_rows == len(free)
    left = SEQ - np.bincount(row_of, weights=np.array(lengths), minlength=num_rows)
    assert sorted(left.tolist()) == sorted(free)


def test_epochs_have_different_orders_and_seeds_repeat() -> None:
    lengths = np.arange(1, 50)
    assert plan_rows(lengths, SEQ, 0, 0).order.tolist() == plan_rows(lengths, SEQ, 0, 0).order.tolist()
    assert plan_rows(lengths, SEQ, 0, 0).order.tolist() != plan_rows(lengths, SEQ, 0, 1).order.tolist()


def test_an_epoch_learns_every_token_but_the_first_of_each_document(store: TokenStore) -> None:
    rows = PackedRowSampler(store, SEQ, 0, data())
    targets = Counter()
    for number in range(rows.rows_per_epoch):
        labels = collate(store, rows.row(number)).labels[0].numpy()
        targets.update(labels[labels != IGNORE_INDEX].tolist())
    ids = [store.ids(document, 0, length) for document, length in enumerate(store.lengths.tolist())]
    assert set(targets) == {int(token) for tokens in ids for token in tokens[1:]}
    assert set(targets.values()) == {1}


def test_no_label_crosses_a_document(store: TokenStore) -> None:
    rows = PackedRowSampler(store, SEQ, 0, data())
    for number in range(50):
        batch = collate(store, DocumentSlices.concatenate([rows.row(number), rows.row(number + 1)]))
        ids, labels, positions = batch.input_ids[0].numpy(), batch.labels[0].numpy(), batch.position_ids[0].numpy()
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            assert positions[start:end].tolist() == list(range(end - start))
            assert labels[end - 1] == IGNORE_INDEX
            assert labels[start : end - 1].tolist() == ids[start + 1 : end].tolist()
        assert batch.num_learned == (labels != IGNORE_INDEX).sum() > 0
        assert batch.max_seqlen == batch.cu_seqlens.diff().max()


def test_dialogues_end_at_a_whole_turn_and_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    talks = make_store(tmp_path / "t", dialogues=True)
    pieces = split_documents(talks, np.arange(len(talks)), SEQ)
    long = talks.lengths > SEQ
    assert pieces.num_dropped == int(long.sum()) > 0
    assert pieces.num_truncated == 0
    assert len(pieces.documents) == len(talks) - pieces.num_dropped
    assert (pieces.starts == 0).all()


@pytest.mark.parametrize("weights", [{}, {"zh": 0.75, "en": 0.25}])
def test_the_batch_sequence_is_the_same_for_all_world_sizes(store: TokenStore, weights: dict[str, float]) -> None:
    def seen(world: int, micro: int, step: int) -> list[int]:
        rows = PackedRowSampler(store, SEQ, 7, data(weights=weights))
        loaders = [PackedLoader(store, rows, micro, 8, rank, world) for rank in range(world)]
        per_rank = [loader.step(step) for loader in loaders]
        return sorted(t for batches in per_rank for batch in batches for t in batch.input_ids[0].tolist())

    for step in (0, 3, 40):  # 40 is beyond the first epoch
        expected = seen(1, 8, step)
        assert len(expected) > 100
        for world, micro in ((1, 1), (2, 2), (4, 1), (8, 1)):
            assert seen(world, micro, step) == expected


def tokens_by_pool(rows: PackedRowSampler, first: int, end: int) -> np.ndarray:
    tokens = np.zeros(len(rows.pools))
    for number in range(first, end):
        tokens[rows.locate(number)[0]] += int(rows.row(number).lengths.sum())
    return tokens


@pytest.mark.parametrize("first", [0, 137, 5_000])
def test_mixture_counts_tokens_over_any_thousand_rows(store: TokenStore, first: int) -> None:
    rows = PackedRowSampler(store, SEQ, 0, data(weights={"zh": 3.0, "en": 1.0}))
    tokens = tokens_by_pool(rows, first, first + 1000)
    assert abs(tokens[0] / tokens.sum() - 0.75) < 0.005


def test_every_pool_is_seen_in_order_and_without_gaps(store: TokenStore) -> None:
    rows = PackedRowSampler(store, SEQ, 0, data(weights={"zh": 5.0, "en": 1.0}))
    seen = {0: 0, 1: 0}
    for number in range(25_000):  # beyond two blocks
        pool, within = rows.locate(number)
        assert within == seen[pool]
        seen[pool] += 1
    assert rows.phases[0].counts(25_000).tolist() == [seen[0], seen[1]]


def test_an_epoch_limit_hands_its_share_to_the_others(store: TokenStore) -> None:
    rows = PackedRowSampler(store, SEQ, 0, data(weights={"zh": 1.0, "en": 1.0}, max_epochs={"en": 2.0}))
    limit = 2 * rows.pools[1].rows_per_epoch
    pools = [rows.locate(number)[0] for number in range(20 * limit)]
    assert sum(pools) == limit
    assert set(pools[-100:]) == {0}
    assert rows.num_rows is None
    ending = PackedRowSampler(store, SEQ, 0, data(weights={"zh": 1.0, "en": 1.0}, max_epochs={"en": 1.0, "zh": 1.5}))
    assert ending.num_rows == ending.pools[1].rows_per_epoch + int(1.5 * ending.pools[0].rows_per_epoch)
    ending.row(ending.num_rows - 1)
    with pytest.raises(UserError, match=r"data.max_epochs: the data provide"):
        ending.row(ending.num_rows)


def test_a_curriculum_changes_the_weights_at_its_token_count(store: TokenStore) -> None:
    phases = [PhaseConfig(tokens=20_000, weights={"zh": 9.0, "en": 1.0})]
    rows = PackedRowSampler(store, SEQ, 0, data(weights={"zh": 1.0, "en": 1.0}, curriculum=phases))
    change = rows.phases[1].first_row
    before, after = tokens_by_pool(rows, 0, change), tokens_by_pool(rows, change, change + 1000)
    assert abs(before.sum() - 20_000) < 2 * SEQ
    assert abs(before[0] / before.sum() - 0.5) < 0.02
    assert abs(after[0] / after.sum() - 0.9) < 0.005


def test_weights_of_the_sources_hold_where_training_gives_none(tmp_path: Path) -> None:
    made = make_store(tmp_path / "s")
    manifest = json.loads((made.path / "manifest.json").read_text()) | {"weights": {"zh": 1.0, "en": 1.0}}
    (made.path / "manifest.json").write_text(json.dumps(manifest))
    phases = [PhaseConfig(tokens=5_000, weights={"zh": 9.0, "en": 1.0})]
    rows = PackedRowSampler(TokenStore(made.path), SEQ, 0, data(curriculum=phases, max_epochs={"en": 5.0}))
    assert rows.names == ["zh", "en"]
    assert PackedRowSampler(TokenStore(made.path), SEQ, 0, data(weights={"en": 1.0})).names == ["en"]
    sources = [SourceConfig(path="x", domain="en", weight=0.5), SourceConfig(path="y", domain="en", weight=0.25)]
    assert data(sources=sources).shares == {"en": 0.75}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"weights": {"zh": 1.0}, "max_epochs": {"zh": 0.001}}, "data.max_epochs.zh=0.001: less than one of its"),
        ({"max_epochs": {"zh": 1.0}}, "data.max_epochs.zh: limits a domain that is mixed by weight"),
        (
            {"weights": {"zh": 1.0}, "curriculum": [PhaseConfig(tokens=5, weights={"en": 1.0})]},
            "Name the same domains in all",
        ),
    ],
)
def test_mixtures_that_contradict_themselves_are_refused(store: TokenStore, options, words: str) -> None:
    with pytest.raises(UserError, match=words):
        PackedRowSampler(store, SEQ, 0, data(**options))


def test_an_epoch_ends_when_every_pool_was_seen_or_may_be_seen_no_more(store: TokenStore) -> None:
    both = {"zh": 1.0, "en": 1.0}
    rows = PackedRowSampler(store, SEQ, 0, data(weights=both, max_epochs={"en": 1.0, "zh": 1.0}))
    assert rows.rows_per_epoch == rows.num_rows == sum(pool.rows_per_epoch for pool in rows.pools)
    free = PackedRowSampler(store, SEQ, 0, data(weights=both))
    seen = free.phases[0].counts(free.rows_per_epoch)
    assert seen[0] == free.pools[0].rows_per_epoch
    assert seen[1] >= free.pools[1].rows_per_epoch


def test_plans_stand_beside_the_store_and_are_used_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = make_store(tmp_path / "s")
    first = [PackedRowSampler(made, SEQ, 0, data()).row(number).as_tuples() for number in range(200)]
    monkeypatch.setattr("fireflyds.data.pack.mixture.plan_rows", None)
    monkeypatch.setattr("fireflyds.data.pack.mixture.split_documents", None)
    assert [
        PackedRowSampler(TokenStore(made.path), SEQ, 0, data()).row(number).as_tuples() for number in range(200)
    ] == first


def test_long_documents_are_cut_at_the_end_of_a_sentence(tmp_path: Path) -> None:
    ids = np.full(200, 3)
    ids[[50, 100, 149]] = 7
    made = write_store(tmp_path / "s", {"zh": [Example(ids, ((0, 200),), 200, is_document=True)]})
    pieces = split_documents(made, np.array([0]), SEQ)
    ends = (pieces.starts + pieces.lengths).tolist()
    assert ends[:2] == [51, 101]
    assert ends[-1] == 200
    assert (pieces.starts[1:] == np.array(ends[:-1]) - 1).all()
    assert (pieces.lengths <= SEQ).all()


def test_prefetched_steps_are_the_steps(store: TokenStore) -> None:
    loader = PackedLoader(store, PackedRowSampler(store, SEQ, 0, data()), 2, 4, 0, 1)
    for number, batches in zip(range(3, 9), loader.steps(3, 9), strict=True):
        for ready, made in zip(batches, loader.step(number), strict=True):
            assert ready.input_ids.tolist() == made.input_ids.tolist()
    ahead = loader.steps(0, 1000)
    next(ahead)
    ahead.close()  # leaves no thread behind
    with pytest.raises(UserError, match="max_epochs"):
        list(
            PackedLoader(
                store, PackedRowSampler(store, SEQ, 0, data(weights={"zh": 1.0}, max_epochs={"zh": 1.0})), 2, 4, 0, 1
            ).steps(0, 10**6)
        )


def test_data_that_end_too_early_are_told_to_every_rank_alike(store: TokenStore) -> None:
    rows = PackedRowSampler(store, SEQ, 0, data(weights={"zh": 1.0}, max_epochs={"zh": 1.0}))
    steps = rows.num_rows // 4
    for rank in (0, 1):
        loader = PackedLoader(store, rows, 2, 4, rank, 2)
        loader.require(steps)
        with pytest.raises(UserError, match=f"the data provide {rows.num_rows} rows, the run needs {4 * (steps + 1)}"):
            loader.require(steps + 1)


def test_unknown_domain_lists_the_known_ones(store: TokenStore) -> None:
    with pytest.raises(UserError, match=r"data.weights.fr: .* It has: en, zh"):
        PackedRowSampler(store, SEQ, 0, data(weights={"fr": 1.0}))


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    damaged = make_store(tmp_path / "d", 5).path
    file = next((damaged / "parts").glob("*.ids"))
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UserError, match="Prepare it again"):
        TokenStore(damaged)
    (damaged / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no token store there \(manifest.json is missing\)"):
        TokenStore(damaged)
