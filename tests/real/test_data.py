"""All real corpora and instructions in one store and one mixture."""

import functools
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from fireflyds.config import CleanConfig, DataConfig, PrepareConfig, SourceConfig
from fireflyds.data.clean.cleaner import contamination
from fireflyds.data.pack.loader import PackedLoader
from fireflyds.data.pack.mixture import PackedRowSampler
from fireflyds.data.read.sources import read_texts
from fireflyds.data.show import format_manifest
from fireflyds.data.store.build import finish_store, make_parts, store_provenance
from fireflyds.data.store.parts import plan_tasks
from fireflyds.data.store.store import TokenStore
from fireflyds.tokenizer.encoder import load_encoder

pytestmark = pytest.mark.data

WEIGHTS = {
    "clue_corpus_small_sample_zh.txt": 0.25, "yuanqu.json": 0.1,
    "guwenguanzhi.json": 0.05, "news_commentary_en_zh.tsv": 0.1, "wiki_demo_en.txt": 0.25, "c4_demo_en.jsonl": 0.15,
    "alpaca_zh_demo.json": 0.02, "oaast_sft_zh.json": 0.02, "dpo_zh_demo.json": 0.01,
    "alpaca_en_demo.json": 0.03, "sharegpt_identity_en.json": 0.01, "identity.json": 0.01,
}  # fmt: skip


@pytest.fixture(scope="module")
def store(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    out = tmp_path_factory.mktemp("store")
    sources = [
        SourceConfig(path=str(next(data_folder.glob(f"*/{name}"))), domain=name.split(".")[0], weight=weight)
        for name, weight in WEIGHTS.items()
    ]
    model = data_folder / "tokenizers" / "chinese_llama2_55296.model"
    config = PrepareConfig(
        data=DataConfig(sources=sources), tokenizer=str(model), out=str(out), template="chinese_llama2"
    )
    encoder = load_encoder(model)
    tasks = plan_tasks(config, encoder.fingerprint())
    made_from = store_provenance(config, encoder, tasks)
    infos = make_parts(config, tasks, functools.partial(load_encoder, model), out / "parts", out / "none", made_from)
    manifest = finish_store(config, tasks, infos, encoder, out, made_from)
    print("\n" + format_manifest(manifest))
    return TokenStore(out)


def test_every_row_of_every_file_is_read(store: TokenStore) -> None:
    assert store.manifest["totals"]["rejected"] == store.manifest["totals"]["dropped"] == 0
    assert store.manifest["totals"]["documents"] == 18_544


def test_ids_are_those_of_sentencepiece(store: TokenStore, data_folder: Path) -> None:
    model = sentencepiece.SentencePieceProcessor(
        model_file=str(data_folder / "tokenizers" / "chinese_llama2_55296.model")
    )
    for name in list(WEIGHTS)[:6]:
        documents = np.flatnonzero(store.domain_ids == store.domains.index(name.split(".")[0])).tolist()
        texts = list(read_texts(str(data_folder / "corpora" / name)))
        assert len(texts) == len(documents)
        for document, text in zip(documents, texts, strict=True):
            ids = store.ids(document, 0, int(store.lengths[document])).tolist()
            assert ids == [model.bos_id(), *model.encode(text), model.eos_id()]


def test_the_mixture_is_kept_over_any_thousand_rows(store: TokenStore) -> None:
    rows = PackedRowSampler(store, 1024, 0, DataConfig())
    for first in (0, 2500):
        tokens = np.zeros(len(rows.pools))
        for number in range(first, first + 1000):
            tokens[rows.locate(number)[0]] += int(rows.row(number).lengths.sum())
        shares = tokens / tokens.sum()
        assert np.abs(shares - np.array(list(WEIGHTS.values()))).max() < 0.005


def test_every_batch_learns(store: TokenStore) -> None:
    loader = PackedLoader(store, PackedRowSampler(store, 1024, 0, DataConfig()), 4, 8, 0, 1)
    for number in range(100):
        for batch in loader.step(number):
            assert batch.num_learned > 0
            assert batch.input_ids.shape[1] <= 4096


def test_what_cmmlu_asks_is_found(data_folder: Path) -> None:
    cmmlu = str(data_folder / "evaluation" / "cmmlu" / "test" / "*.csv")
    assert len(contamination(CleanConfig(decontaminate=[cmmlu]))) > 200_000
