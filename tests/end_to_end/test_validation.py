"""A run with validation: unchanged losses, reference values kept across a resume, the guard, and samples."""

import json
import re
from pathlib import Path

import pytest
from samples import CHINESE, ENGLISH
from tiny_run import tiny_keys

pytestmark = pytest.mark.slow

TWO_RANKS = ("torchrun", "--standalone", "--nproc_per_node", "2")


def rows(tmp_path: Path, run: str, name: str) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "runs" / run / name).read_text().splitlines()]


@pytest.fixture
def arguments(verb, tmp_path: Path, base_tokenizer: Path) -> list[str]:
    """Training data in Chinese alone; the held-out store has Chinese and English."""
    for name, texts in (("zh", CHINESE[:-6]), ("held_zh", CHINESE[-6:]), ("held_en", ENGLISH[-9:])):
        (tmp_path / f"{name}.txt").write_text("\n".join(texts), encoding="utf-8")
    sources = "data.sources=[{path: held_zh.txt, domain: zh}, {path: held_en.txt, domain: en}]"
    verb("prepare", "data=zh.txt", f"tokenizer={base_tokenizer}", "out=store", "workers=1")
    verb("prepare", sources, f"tokenizer={base_tokenizer}", "out=held", "workers=1")
    return [
        *tiny_keys(base_tokenizer),
        "optim.steps=6",
        "optim.lr=3e-2",
        "seq_len=128",
        "micro_batch_size=1",
        "global_batch_size=4",
        "checkpoint.every=2",
        "log_every=1",
        "optim.schedule=constant",
        "optim.warmup_steps=0",
        "tuning=lora",
        "tuning.r=4",
        "tuning.dropout=0.3",
        "tuning.embeddings=all",
        "tuning.head=all",
        "zero.extra.zero_optimization.stage3_param_persistence_threshold=0",
    ]


VALIDATION = ["validation.store=held", "validation.every=2", "validation.rows=3", "validation.max_new_tokens=5"]
PROMPTS = "validation.prompts=['the old bridge','青岭镇','a']"


@pytest.mark.parametrize("stage", [2, 3])
def test_validation_changes_no_loss_and_two_ranks_measure_the_same_as_one(verb, arguments, tmp_path, stage) -> None:
    stage_arguments = [*arguments, f"zero={stage}"]
    verb("train", "run=without", *stage_arguments, start=TWO_RANKS)
    stderr = verb(
        "train",
        "run=with",
        *stage_arguments,
        *VALIDATION,
        PROMPTS,
        "tracking=wandb",
        "tracking.mode=offline",
        start=TWO_RANKS,
    ).stderr
    assert "validation at step 0: bits/byte  zh " in stderr
    losses = [
        [(row["loss"], row["grad_norm"]) for row in rows(tmp_path, run, "metrics.jsonl")] for run in ("without", "with")
    ]
    assert losses[0] == losses[1]
    validation_rows = rows(tmp_path, "with", "validation.jsonl")
    assert [row["step"] for row in validation_rows] == [0, 2, 4, 6]
    # The loss of an untrained model over 400 tokens.
    assert validation_rows[0]["validation/loss/zh"] == pytest.approx(5.99, abs=0.3)
    assert validation_rows[-1]["validation/bits_per_byte/zh"] < validation_rows[0]["validation/bits_per_byte/zh"] - 0.5
    samples = rows(tmp_path, "with", "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in samples[:4]] == [
        (0, "the old bridge"),
        (0, "青岭镇"),
        (0, "a"),
        (2, "the old bridge"),
    ]
    verb("train", "run=alone", *arguments, "zero=0", *VALIDATION, PROMPTS)
    for single_rank_row, two_rank_row in zip(
        rows(tmp_path, "alone", "validation.jsonl")[:1], validation_rows, strict=False
    ):
        assert single_rank_row["validation/bits_per_byte/en"] == pytest.approx(
            two_rank_row["validation/bits_per_byte/en"], rel=1e-5
        )
    assert [row["text"] for row in rows(tmp_path, "alone", "samples.jsonl")[:3]] == [row["text"] for row in samples[:3]]
    state = json.loads((tmp_path / "runs" / "with" / "trainer_state.json").read_text())
    assert state["global_step"] == 6
    assert sum("eval_bits_per_byte_en" in entry for entry in state["log_history"]) == 4


def test_the_guard_compares_with_step_0_across_a_resume_and_ends_the_run(verb, arguments, tmp_path) -> None:
    guard = [*VALIDATION, "validation.max_rise=0.0001"]
    short_arguments = [argument.replace("optim.steps=6", "optim.steps=2") for argument in arguments]
    stderr = verb("train", "run=guarded", *short_arguments, *guard).stderr
    has_warned = "warning: step 2: validation.guard=en: rose to" in stderr
    config = tmp_path / "runs" / "guarded" / "config.yaml"
    config.write_text(config.read_text().replace("steps: 2", "steps: 6"))
    completed = verb("train", "run=guarded", *arguments, *guard, "validation.stop=true", check=False)
    validation_rows = rows(tmp_path, "guarded", "validation.jsonl")
    key = "validation/bits_per_byte/en"
    assert has_warned == (validation_rows[1][key] > validation_rows[0][key] * 1.0001)
    assert validation_rows[-1][key] > validation_rows[0][key]
    assert completed.returncode == 2, completed.stderr[-2000:]
    assert f"above its {validation_rows[0][key]:.4f} at step 0" in completed.stderr
    assert re.search(
        r"allows 0.01 %\. Mix more en into the data, lower optim.lr, or raise validation.max_rise$", completed.stderr
    )
    last_step = validation_rows[-1]["step"]
    assert last_step < 6 or "step 6" in completed.stderr
    assert (tmp_path / "runs" / "guarded" / "checkpoints" / f"step-{last_step:06d}").is_dir()
