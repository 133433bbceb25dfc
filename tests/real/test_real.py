"""The same verbs on real tokenizers, corpora and benchmarks."""

import json
import shutil
import statistics
from pathlib import Path

import pytest

pytestmark = pytest.mark.data

TINY_LLAMA = (
    "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 4, max_position_embeddings: 1024, tie_word_embeddings: false}"
)


@pytest.mark.slow
def test_the_road_on_real_text(verb, data_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tok").mkdir()
    shutil.copy(data_folder / "tokenizers" / "chinese_llama2_55296.model", tmp_path / "tok" / "tokenizer.model")
    corpora, instructions = data_folder / "corpora", data_folder / "instructions"
    for name in ("clue_corpus_small_sample_zh", "wiki_demo_en"):
        shutil.copy(corpora / f"{name}.txt", tmp_path / f"{name}.txt")
    sources = "data.sources=[{path: clue_corpus_small_sample_zh.txt, domain: zh}, {path: wiki_demo_en.txt, domain: en}]"
    print(verb("prepare", "data=at_path", sources, "tokenizer=tok", "out=cpt").stdout)
    scratch = ["model=at_path", "model.init=scratch", "model.tokenizer=tok", f"model.architecture={TINY_LLAMA}"]
    small = ["seq_len=256", "micro_batch_size=1", "global_batch_size=4", "log_every=5"]
    start = ("torchrun", "--standalone", "--nproc_per_node", "2")
    weights = ["data.weights.zh=0.8", "data.weights.en=0.2"]
    verb("train", "run=cpt", *scratch, "data=cpt", *weights, "optim.steps=40", "optim.lr=3e-3", *small, start=start)
    verb("export", "run=cpt")
    sources = (
        f"data.sources=[{{path: '{instructions}/alpaca_zh_demo.json'}}, {{path: '{instructions}/oaast_sft_zh.json'}}]"
    )
    print(verb("prepare", "data=at_path", sources, "tokenizer=runs/cpt/export", "template=llama2", "out=sft").stdout)
    sft = [
        "model=runs/cpt/export",
        "data=sft",
        "tuning=qlora",
        "tuning.embeddings=all",
        "tuning.head=all",
        "optim.steps=40",
        "optim.lr=3e-3",
        *small,
    ]
    verb("train", "run=sft", *sft, start=start)
    verb("export", "run=sft")
    for run in ("cpt", "sft"):
        rows = [json.loads(line) for line in (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()]
        first, last = (statistics.mean(row["loss"] for row in part) for part in (rows[:5], rows[-5:]))
        print(f"{run}: mean loss of five steps {first:.3f} -> {last:.3f}, {rows[-1]['tokens']:,} tokens")
        assert last < first
    cmmlu = [f"cmmlu.data={data_folder / 'evaluation' / 'cmmlu'}", "cmmlu.subjects=[anatomy,astronomy]", "limit=40"]
    done = verb(
        "evaluate",
        "model=runs/sft/export",
        "tasks=[cmmlu,bits_per_byte]",
        "bits_per_byte.texts.zh=clue_corpus_small_sample_zh.txt",
        "limit=40",
        *cmmlu,
    )
    print(done.stdout)
    scores = json.loads((tmp_path / "runs" / "sft" / "export" / "eval" / "scores.json").read_text())["results"]
    figures = {score["task"]: score["figures"] for score in scores}
    assert figures["cmmlu"]["questions"] == 80
    assert not any(score["complete"] for score in scores)
    assert 0 < figures["bits_per_byte"]["zh"] < 12
