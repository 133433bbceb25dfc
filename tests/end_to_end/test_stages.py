"""Successive stages: the vocabulary first, then adapters, each initialised from the previous run; and the plan of a
run."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from samples import CHINESE, ENGLISH

SMALL = [
    "seq_len=128",
    "micro_batch_size=1",
    "global_batch_size=4",
    "optim.lr=1e-2",
    "log_every=1",
    "optim.schedule=constant",
]
ARCHITECTURE = (
    "{model_type: llama, hidden_size: 64, intermediate_size: 128, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, max_position_embeddings: 256, tie_word_embeddings: false}"
)
ADAPTERS = ["tuning.r=4", "tuning.dropout=0"]


def losses(tmp_path: Path, run: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (tmp_path / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture
def old_vocab_size(verb, tmp_path: Path, base_tokenizer: Path) -> int:
    """A base, its expansion and a Chinese store. Returns the vocabulary size of the base."""
    shutil.copytree(base_tokenizer, tmp_path / "tok")
    (tmp_path / "en.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    (tmp_path / "zh.txt").write_text("\n".join(CHINESE), encoding="utf-8")
    verb("prepare", "data=en.txt", "tokenizer=tok", "out=en", "workers=1")
    scratch = ["model=at_path", "model.init=scratch", "model.tokenizer=tok", f"model.architecture={ARCHITECTURE}"]
    verb("train", "run=base", *scratch, "data=en", "optim.steps=4", *SMALL)
    verb("export", "run=base")
    verb("expand", "base=runs/base/export", "corpus=zh.txt", "num_pieces=60", "max_piece_length=3", "out=expanded")
    verb("prepare", "data=zh.txt", "tokenizer=expanded", "out=zh", "workers=1")
    vocab_size = json.loads((tmp_path / "expanded" / "config.json").read_text())["base_vocab_size"]
    assert vocab_size == json.loads((tmp_path / "runs" / "base" / "export" / "config.json").read_text())["vocab_size"]
    return vocab_size


@pytest.mark.slow
def test_vocabulary_adapters_and_a_new_schedule_in_successive_runs(verb, old_vocab_size: int, tmp_path: Path) -> None:
    base = ["model=expanded", "data=zh", *SMALL]
    new_rows = ["tuning.embeddings=new_rows", "tuning.head=new_rows"]
    stderr = verb("train", "run=rows", "tuning=embeddings", *new_rows, *base, "optim.steps=6").stderr
    rows = json.loads((tmp_path / "expanded" / "config.json").read_text())["vocab_size"] - old_vocab_size
    assert f"rows: freeze, {2 * rows * 64:,} of " in stderr
    adapters = [*base, "tuning=lora", *ADAPTERS, *new_rows]
    two_ranks = ("torchrun", "--standalone", "--nproc_per_node", "2")
    verb("train", "run=lora", *adapters, "init_from=rows", "optim.steps=6", "zero=3", start=two_ranks)
    assert losses(tmp_path, "lora")[0] < losses(tmp_path, "rows")[-1] + 0.05
    # The earlier run is no longer needed: its trained weights are in this run's own folder.
    shutil.rmtree(tmp_path / "runs" / "rows")
    verb("train", "run=again", *adapters, "init_from=lora", "optim.steps=4", "optim.lr=3e-3")
    assert losses(tmp_path, "again")[0] < losses(tmp_path, "lora")[-1] + 0.05
    verb("export", "run=again")
    metadata = json.loads((tmp_path / "runs" / "again" / "export" / "export.json").read_text())
    assert metadata["reload_max_rel_diff"] <= 1e-5
    weights_before, weights_after = weights(tmp_path / "expanded"), weights(tmp_path / "runs" / "again" / "export")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(weights_before[name][:old_vocab_size], weights_after[name][:old_vocab_size])
        assert (weights_before[name][old_vocab_size:] != weights_after[name][old_vocab_size:]).any(
            1
        ).float().mean() > 0.5
    # Weights that an earlier stage trained and this one freezes are part of this run too.
    verb("train", "run=frozen", *base, "tuning=lora", *ADAPTERS, "init_from=lora", "optim.steps=2")
    verb("export", "run=frozen")
    exported_head = weights(tmp_path / "runs" / "frozen" / "export")["lm_head.weight"]
    start_rows = load_file(tmp_path / "runs" / "frozen" / "start" / "weights.safetensors")["lm_head.weight"]
    torch.testing.assert_close(exported_head[old_vocab_size:], start_rows)
    assert torch.equal(exported_head[:old_vocab_size], weights_before["lm_head.weight"][:old_vocab_size])


@pytest.mark.slow
def test_an_incompatible_init_from_is_refused(verb, old_vocab_size: int, tmp_path: Path) -> None:
    base = ["data=zh", *SMALL, "optim.steps=2"]
    verb("train", "run=lora", "model=expanded", *base, "tuning=lora", *ADAPTERS)
    shutil.copytree(tmp_path / "expanded", tmp_path / "other")
    changed_weights = weights(tmp_path / "other")
    changed_weights["lm_head.weight"][0] += 1
    from safetensors.torch import save_file

    save_file(changed_weights, tmp_path / "other" / "model.safetensors", {"format": "pt"})
    for arguments, message in (
        (["model=other", "tuning=lora", *ADAPTERS, "init_from=lora"], "that run's base is"),
        (["model=expanded", "tuning=lora", *ADAPTERS, "init_from=nothing"], "no such run in runs. Known: base, lora"),
        (
            ["model=expanded", "tuning=lora", *ADAPTERS, "tuning.alpha=32", "init_from=lora"],
            "adapters with alpha=16.0, this one 32.0",
        ),
        (
            ["model=expanded", "tuning=full", "init_from=lora"],
            "python launch/export.py run=lora, then model=runs/lora/export",
        ),
    ):
        completed = verb("train", "run=next", *arguments, *base, check=False)
        assert completed.returncode == 2, completed.stderr
        assert message in completed.stderr
        assert "Traceback" not in completed.stderr
        shutil.rmtree(tmp_path / "runs" / "next", ignore_errors=True)
    trainable_folder = next((tmp_path / "runs" / "lora" / "checkpoints").glob("step-*")) / "trainable"
    metadata = json.loads((trainable_folder / "trainable.json").read_text())
    assert metadata["vocab_size"] > old_vocab_size
    assert len(metadata["base"]) == len(metadata["tokenizer"]) == 64


@pytest.mark.slow
def test_offloaded_training_has_the_losses_of_training_without_offload(
    verb, old_vocab_size: int, tmp_path: Path
) -> None:
    base = ["model=expanded", "data=zh", *SMALL, "optim.steps=4"]
    verb("train", "run=plain", *base)
    verb("train", "run=offloaded", *base, "zero.offload_optimizer=cpu")
    for expected, actual in zip(losses(tmp_path, "plain"), losses(tmp_path, "offloaded"), strict=True):
        assert abs(expected - actual) < 1e-4 * expected


@pytest.mark.parametrize(
    ("experiment", "options", "trainable", "total"),
    [
        ("firefly_llama2_7b_ext_cpt_qlora", [], 612_892_672, 7_089_164_288),
        ("firefly_llama2_7b_ext_sft_qlora", [], 612_892_672, 7_089_164_288),
        ("firefly_llama2_13b_ext_cpt_qlora", [], 816_578_560, 13_504_762_880),
        ("firefly_llama2_13b_ext_sft_qlora", [], 816_578_560, 13_504_762_880),
        (
            "firefly_llama2_7b_ext_cpt_qlora",
            ["tuning.embeddings=frozen", "tuning.head=frozen"],
            159_907_840,
            7_089_164_288,
        ),
        (
            "firefly_llama2_13b_ext_cpt_qlora",
            ["tuning.embeddings=frozen", "tuning.head=frozen"],
            250_347_520,
            13_504_762_880,
        ),
        # Embeddings and head of 23,296 x 4,096 new rows: 191 million instead of 453.
        (
            "firefly_llama2_7b_ext_cpt_qlora",
            ["tuning.embeddings=new_rows", "tuning.head=new_rows"],
            350_748_672,
            7_089_164_288,
        ),
        (
            "firefly_llama2_7b_ext_cpt_qlora",
            ["tuning=full", "tuning.embeddings=all", "tuning.head=all"],
            6_929_256_448,
            6_929_256_448,
        ),
    ],
)
def test_the_plan_of_published_recipes_has_the_published_parameter_counts(
    experiment: str, options: list[str], trainable: int, total: int
) -> None:
    from fireflyds import app
    from fireflyds.models import load, tuning
    from fireflyds.optim import param_groups

    config = app.compose("plan", [f"experiment={experiment}", *options])
    hf_config = load.architecture_of(config.model)
    family, rows = load.family_of(hf_config), load.base_vocab_size(config.model, hf_config)
    model = tuning.apply_tuning(load.bare_model(hf_config), family, config.tuning, rows, 0)
    assert param_groups.count_parameters(model) == (total, trainable)
    table = param_groups.summarize_groups(model, config, config.hardware.precision)
    assert sum(row.parameters for row in table) == total
    assert sum(row.parameters for row in table[:-1]) == trainable


def test_the_plan_needs_no_weights_no_data_and_no_run(verb) -> None:
    completed = verb("plan", "experiment=firefly_llama2_7b_ext_cpt_qlora", "cluster=v100x4", "format=json")
    plan = json.loads(completed.stdout)
    assert (plan["parameters"], plan["trainable_parameters"]) == (7_089_164_288, 612_892_672)
    assert [row["group"] for row in plan["groups"]] == ["lora_A", "lora_B", "embeddings", "head", "frozen"]
    # 6.476 billion parameters of the body, 4.127 bits each.
    assert plan["groups"][-1]["memory_bytes"] == pytest.approx(6_476_005_376 * 4.127 / 8, rel=2e-3)
    assert set(plan["memory_per_gpu"]) == {
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "logits",
        "buffers",
        "fixed",
        "total",
    }
    assert plan["memory_per_gpu"] == plan["own"]["memory_per_gpu"]
    assert {choice["stage"] for choice in plan["choices"] if choice["fits"]} == {1, 2, 3}
    assert plan["fastest"] == plan["choices"][0]
    stdout = verb("plan", "experiment=firefly_llama2_7b_ext_cpt_qlora", "cluster=v100x4", "optim.steps=100").stdout
    assert "612,892,672 of 7,089,164,288 parameters train" in stdout
    assert "4 x V100 (31.7 GiB), fp16, 125 TFLOP/s at most, MFU 30% expected" in stdout
    assert "100 steps of 48 rows, 4,915,200 tokens, " in stdout
    assert "as configured (zero=2, offload none, micro_batch_size=6, with checkpointing): fits" in stdout
    refusal = verb("plan", "experiment=firefly_llama2_7b_ext_cpt_qlora", "tuning.bits=8", "zero=3", check=False)
    assert refusal.returncode == 2
    assert "Use zero=2, or tuning.bits=4" in refusal.stderr


@pytest.mark.slow
def test_a_refused_start_does_not_reserve_the_run_name(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    (tmp_path / "en.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    verb("prepare", "data=en.txt", f"tokenizer={base_tokenizer}", "out=en", "workers=1")
    base = [
        "run=r",
        "model=at_path",
        "model.init=scratch",
        f"model.tokenizer={base_tokenizer}",
        "data=en",
        "optim.steps=1",
        *SMALL,
    ]
    base.append(f"model.architecture={ARCHITECTURE}")
    for overrides, message in (
        (["init_from=nope"], "init_from=nope: no such run in runs. Known: "),
        (["tuning=lora", "tuning.target_modules=[q_porj]"], "'q_porj' matches no linear layer"),
        (
            ["hardware.attention=efficient"],
            "hardware.attention=efficient: cannot run here (needs an NVIDIA GPU). Available: auto, reference",
        ),
        (["optim.head.lr=1", "tuning=lora"], "optim.head.lr=1.0: no parameter of that group trains"),
    ):
        completed = verb("train", *base, *overrides, check=False)
        assert completed.returncode == 2, completed.stderr
        assert message in completed.stderr
        assert "Traceback" not in completed.stderr
    verb("train", *base)
    assert len(losses(tmp_path, "r")) == 1
