"""Preference pairs and labelled answers: the chosen ones to imitate, or both as documents of their own kind."""

import json
from pathlib import Path

import numpy as np
import pytest

from fireflyds.config import LossOn, Preference
from fireflyds.data.chat_template import find_template
from fireflyds.data.encode import encode_preference, encode_sample
from fireflyds.data.store.store import TokenStore, open_store
from fireflyds.errors import UserError
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.types import Message, Sample

PAIR = Sample(
    messages=(Message("user", "q"), Message("assistant", "good")),
    rejected=(Message("user", "q"), Message("assistant", "bad one")),
)
ROWS = [
    {"prompt": "q", "chosen": "good", "rejected": "bad one"},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "yes"}], "label": True},
    {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "no"}], "label": False},
    {"prompt": "q", "chosen": "same", "rejected": "same"},
]


def test_a_pair_is_one_document_with_loss_on_both_answers(encoder) -> None:
    chat = find_template(encoder, "firefly")
    pair = encode_preference(encoder, chat, PAIR, LossOn.answers, Preference.pairs)
    chosen, rejected = (
        encode_sample(encoder, chat, Sample(messages=messages)) for messages in (PAIR.messages, PAIR.rejected)
    )
    assert pair.rejected_start == len(chosen.input_ids)
    assert pair.input_ids.tolist() == [*chosen.input_ids.tolist(), *rejected.input_ids.tolist()]
    assert [pair.input_ids[start:end].tolist() for start, end in pair.spans] == [
        example.input_ids[start:end].tolist() for example in (chosen, rejected) for start, end in example.spans
    ]


def test_shared_turns_of_a_pair_carry_no_loss(encoder) -> None:
    chat = find_template(encoder, "firefly")
    turns = (Message("user", "a"), Message("assistant", "b"))
    longer = Sample(messages=(*turns, *PAIR.messages), rejected=(*turns, *PAIR.rejected))
    pair = encode_preference(encoder, chat, longer, LossOn.answers, Preference.pairs)
    learned = [encoder.decode(pair.input_ids[start : end - 1].tolist()).strip() for start, end in pair.spans]
    assert learned == ["good", "bad one"]


@pytest.fixture
def prepared(verb, base_tokenizer: Path, tmp_path: Path):
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))

    def run(preference: str) -> TokenStore:
        words = ["data=d.jsonl", f"tokenizer={base_tokenizer}", "max_rejected=0.5", f"out={preference}"]
        verb("prepare", *words, f"preference={preference}")
        return TokenStore(tmp_path / preference)

    return run


def test_a_store_of_pairs_is_not_trained_on_as_text(prepared, base_tokenizer: Path, tmp_path: Path) -> None:
    store = prepared("pairs")
    assert (store.rejected_starts > 0).tolist() == [True, False, False]
    assert np.asarray(store.labels).tolist() == [-1, 1, 0]
    assert store.manifest["per_domain"]["text"]["pairs"] == 1
    assert store.manifest["per_domain"]["text"]["unread"] == {}
    rejected = json.loads((tmp_path / "pairs" / "rejected.jsonl").read_text())
    assert rejected["line"] == 4
    assert rejected["reason"] == "chosen and rejected are equal, or one is the beginning of the other"
    with pytest.raises(UserError, match="Prepare it with preference=chosen"):
        open_store("data.store", str(store.path), load_encoder(base_tokenizer).fingerprint(), "t")


def test_the_chosen_answers_alone_are_dialogues(prepared, base_tokenizer: Path, tmp_path: Path) -> None:
    store = prepared("chosen")
    assert len(open_store("data.store", str(store.path), load_encoder(base_tokenizer).fingerprint(), "t")) == 3
    assert store.manifest["per_domain"]["text"]["unread"] == {"rejected": 2}
    rejected = json.loads((tmp_path / "chosen" / "rejected.jsonl").read_text())
    assert (rejected["line"], rejected["reason"]) == (3, "label is false, so its answer must not be learned")
