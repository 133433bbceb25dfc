"""Packing and mixing: nothing lost, nothing twice, no label across documents, the same rows for all world sizes."""

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fireflyds.data.loader import PackedLoader, collate
from fireflyds.data.mix import RowSequence
from fireflyds.data.pack import cut, plan
from fireflyds.data.store import StoreWriter, TokenStore
from fireflyds.errors import UserError
from fireflyds.types import IGNORE_INDEX, Example

SEQ = 64


def make_store(folder: Path, num_docs: int = 300, dialogues: bool = False, seed: int = 0) -> TokenStore:
    """Documents whose every token is unique, so that where a token came from can be read off it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    writer = StoreWriter(folder, 1 << 20)
    at = 0
    for number in range(num_docs):
        length = int(rng.integers(2, 150))
        ids = np.arange(at, at + length)
        at += length
        middle = int(rng.integers(1, length))
        spans = ((middle, length),) if dialogues else ((0, length),)
        writer.add(Example(ids, spans, length), "zh" if number % 3 else "en")
    writer.close({"template": None, "made_from": {"tokenizer": "x"}, "totals": {}})
    return TokenStore(folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("store") / "s")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(1, SEQ), min_size=1, max_size=200), st.integers(0, 5), st.integers(0, 3))
def test_every_piece_is_in_exactly_one_row_and_no_row_is_too_long(lengths: list[int], seed: int, epoch: int) -> None:
    sizes = np.array(lengths)
    made = plan(sizes, SEQ, seed, epoch)
    assert sorted(made.order.tolist()) == list(range(len(lengths)))
    assert all(sizes[made.row(i)].sum() == made.row_tokens[i] <= SEQ for i in range(len(made)))


def test_rows_are_nearly_full() -> None:
    lengths = np.random.default_rng(0).integers(1, SEQ, 20_000)
    made = plan(lengths, SEQ, 0, 0)
    assert lengths.sum() / (len(made) * SEQ) > 0.98


def test_epochs_have_different_orders_and_seeds_repeat() -> None:
    lengths = np.arange(1, 50)
    assert plan(lengths, SEQ, 0, 0).order.tolist() == plan(lengths, SEQ, 0, 0).order.tolist()
    assert plan(lengths, SEQ, 0, 0).order.tolist() != plan(lengths, SEQ, 0, 1).order.tolist()


def test_an_epoch_learns_every_token_but_the_first_of_each_document(store: TokenStore) -> None:
    rows = RowSequence(store, SEQ, 0, {})
    targets = Counter()
    for number in range(rows.rows_per_epoch):
        labels = collate(store, rows.row(number)).labels[0].numpy()
        targets.update(labels[labels != IGNORE_INDEX].tolist())
    firsts = set(store.offsets[:-1].tolist())
    assert set(targets) == set(range(int(store.offsets[-1]))) - firsts
    assert set(targets.values()) == {1}


def test_no_label_crosses_a_document(store: TokenStore) -> None:
    rows = RowSequence(store, SEQ, 0, {})
    for number in range(50):
        batch = collate(store, rows.row(number) + rows.row(number + 1))
        ids, labels, positions = batch.input_ids[0].numpy(), batch.labels[0].numpy(), batch.position_ids[0].numpy()
        for start, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
            assert positions[start:end].tolist() == list(range(end - start))
            assert labels[end - 1] == IGNORE_INDEX
            assert labels[start : end - 1].tolist() == ids[start + 1 : end].tolist()
        assert batch.num_learned == (labels != IGNORE_INDEX).sum() > 0
        assert batch.max_seqlen == batch.cu_seqlens.diff().max()


def test_dialogues_end_at_a_whole_turn_and_what_does_not_fit_is_counted(tmp_path: Path) -> None:
    talks = make_store(tmp_path / "t", dialogues=True)
    pieces = cut(talks, np.arange(len(talks)), SEQ)
    long = talks.lengths > SEQ
    assert pieces.dropped == int(long.sum()) > 0
    assert pieces.truncated == 0
    assert len(pieces.documents) == len(talks) - pieces.dropped
    assert (pieces.starts == 0).all()


@pytest.mark.parametrize("weights", [{}, {"zh": 0.75, "en": 0.25}])
def test_the_batch_sequence_is_the_same_for_all_world_sizes(store: TokenStore, weights: dict[str, float]) -> None:
    def seen(world: int, micro: int, step: int) -> list[int]:
        rows = RowSequence(store, SEQ, 7, weights)
        loaders = [PackedLoader(store, rows, micro, 8, rank, world) for rank in range(world)]
        per_rank = [loader.step(step) for loader in loaders]
        return sorted(t for batches in per_rank for batch in batches for t in batch.input_ids[0].tolist())

    for step in (0, 3, 40):  # 40 is beyond the first epoch
        expected = seen(1, 8, step)
        assert len(expected) > 100
        for world, micro in ((1, 1), (2, 2), (4, 1), (8, 1)):
            assert seen(world, micro, step) == expected


def test_mixture_counts_tokens(store: TokenStore) -> None:
    rows = RowSequence(store, SEQ, 0, {"zh": 3.0, "en": 1.0})
    rows.row(999)
    shares = rows.tokens / rows.tokens.sum()
    assert abs(shares[0] - 0.75) < 0.005


def test_unknown_domain_lists_the_known_ones(store: TokenStore) -> None:
    with pytest.raises(UserError, match=r"data.weights.fr: .* It has: en, zh"):
        RowSequence(store, SEQ, 0, {"fr": 1.0})


def test_a_damaged_store_is_refused(tmp_path: Path) -> None:
    damaged = make_store(tmp_path / "d", 5).path
    (damaged / "ids.bin").write_bytes((damaged / "ids.bin").read_bytes()[:-4])
    with pytest.raises(UserError, match="Prepare it again"):
        TokenStore(damaged)
    (damaged / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"no token store there \(manifest.json is missing\)"):
        TokenStore(damaged)
