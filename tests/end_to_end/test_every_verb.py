"""All verbs in sequence on a tiny model, with one rank and with two."""

import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file
from samples import CHINESE, ENGLISH

pytestmark = pytest.mark.real_process

ARCHITECTURE = (
    "{model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2, num_attention_heads: 2, "
    "num_key_value_heads: 2, max_position_embeddings: 256, tie_word_embeddings: false}"
)
SMALL = ["seq_len=128", "micro_batch_size=1", "global_batch_size=4", "optim.lr=1e-2", "log_every=1"]
TWO_RANKS = ("torchrun", "--standalone", "--nproc_per_node", "2")


def write(folder: Path, name: str, rows: list[dict]) -> str:
    (folder / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return name


def losses(run_dir: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def exported_base(verbs_of, tmp_path_factory: pytest.TempPathFactory, base_tokenizer: Path) -> Path:
    """A base model trained for a few steps on English, exported."""
    folder = tmp_path_factory.mktemp("base")
    verb = verbs_of(folder)
    shutil.copytree(base_tokenizer, folder / "tok")
    write(folder, "en.jsonl", [{"text": text} for text in ENGLISH])
    verb("prepare", "data=en.jsonl", "tokenizer=tok", "out=en", "workers=1")
    scratch = ["model=at_path", "model.init=scratch", "model.tokenizer=tok", f"model.architecture={ARCHITECTURE}"]
    verb("train", "run=base", *scratch, "data=en", "optim.steps=6", *SMALL)
    verb("export", "run=base")
    return folder


@pytest.fixture
def base(exported_base: Path, tmp_path: Path) -> Path:
    """A copy of the exported base for each test."""
    shutil.copytree(exported_base, tmp_path, dirs_exist_ok=True)
    return tmp_path / "runs" / "base"


def test_all_verbs_in_sequence(verb, base: Path, tmp_path: Path) -> None:
    assert losses(base)[-1] < losses(base)[0]
    assert {path.name for path in base.iterdir()} >= {
        "config.yaml",
        "provenance.json",
        "metrics.jsonl",
        "train.log",
        "logs",
        "loss.png",
        "checkpoints",
    }
    write(tmp_path, "zh.jsonl", [{"text": text} for text in CHINESE])
    stdout = verb(
        "expand", "base=runs/base/export", "corpus=zh.jsonl", "num_pieces=60", "max_piece_length=3", "out=expanded"
    ).stdout
    assert "tokens per character" in stdout
    verb("prepare", "data=zh.jsonl", "tokenizer=expanded", "out=zh", "workers=2")
    totals = json.loads((tmp_path / "zh" / "manifest.json").read_text())["totals"]
    assert totals == {
        "documents": 36,
        "tokens": totals["tokens"],
        "bytes": sum(len(document.encode()) for document in CHINESE),
        "dropped": 0,
        "rejected": 0,
        "read": 36,
        "dialogues": 0,
        "learned": totals["tokens"],
        "unknown": 0,
        "left_out_thoughts": 0,
        "pairs": 0,
        "unreadable_bytes": 0,
        "source_bytes": (tmp_path / "zh.jsonl").stat().st_size,
    }
    verb("train", "run=cpt", "model=expanded", "data=zh", "optim.steps=8", *SMALL, start=TWO_RANKS)
    assert losses(tmp_path / "runs" / "cpt")[-1] < losses(tmp_path / "runs" / "cpt")[0]
    verb("export", "run=cpt")

    dialogue = {
        "conversation": [
            {"human": "青岭镇的特产是什么？", "assistant": "蜂蜜。"},
            {"human": "河呢？", "assistant": "清水河。"},
        ]
    }
    write(tmp_path, "talks.jsonl", [dialogue] * 40)
    verb("prepare", "data=talks.jsonl", "tokenizer=runs/cpt/export", "out=sft", "workers=1")
    sft = [
        "model=runs/cpt/export",
        "data=sft",
        "tuning=qlora",
        "tuning.embeddings=all",
        "tuning.head=all",
        "optim.epochs=6",
        *SMALL,
    ]
    verb("train", "run=sft", *sft, start=TWO_RANKS)
    verb("export", "run=sft", "out=chat")
    metadata = json.loads((tmp_path / "chat" / "export.json").read_text())
    assert metadata["reload_max_rel_diff"] <= 1e-5
    assert metadata["template"] == "firefly"

    write(tmp_path, "q.jsonl", [{"question": "青岭镇的特产是什么？", "choices": ["蜂蜜。", "清水河。"], "answer": 0}])
    verb(
        "evaluate",
        "model=chat",
        "tasks=[bits_per_byte,multiple_choice]",
        "bits_per_byte.texts.zh=zh.jsonl",
        "multiple_choice.questions=q.jsonl",
    )
    results = json.loads((tmp_path / "chat" / "eval" / "scores.json").read_text())["results"]
    assert [result["task"] for result in results] == ["bits_per_byte", "multiple_choice"]
    assert {result["options"]["prompt"] for result in results} == {"chat"}
    assert 0 < results[0]["figures"]["zh"] < 20
    answer = verb("chat", "model=chat", "prompt=青岭镇的特产是什么？", "max_new_tokens=8", "temperature=0").stdout
    assert answer.strip()


def test_the_export_loads_without_fireflyds(verb, base: Path, tmp_path: Path) -> None:
    import subprocess

    code = (
        "import sys; sys.modules['fireflyds'] = None; sys.modules['fireflyds_kernels'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "t, m = AutoTokenizer.from_pretrained('runs/base/export'), "
        "AutoModelForCausalLM.from_pretrained('runs/base/export')\n"
        "print(m(**t('the old bridge', return_tensors='pt')).logits.shape[-1], len(t))"
    )
    completed = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert completed.stdout.split() == ["400", "400"], completed.stderr[-2000:]


@pytest.mark.slow
def test_a_run_is_exported_in_the_format_it_was_trained_in(verb, base: Path, tmp_path: Path) -> None:
    # As if it had been trained on a GPU with bf16, and were exported on this CPU, which would train in fp32.
    inputs = json.loads((base / "inputs.json").read_text())
    assert inputs["precision"] == "fp32"
    (base / "inputs.json").write_text(json.dumps(inputs | {"precision": "bf16"}))
    verb("export", "run=base", "out=bf16", "verify=false")
    assert json.loads((tmp_path / "bf16" / "config.json").read_text())["dtype"] == "bfloat16"
    assert {str(tensor.dtype) for tensor in load_file(tmp_path / "bf16" / "model.safetensors").values()} == {
        "torch.bfloat16"
    }


@pytest.mark.slow
def test_all_launchers_and_world_sizes_give_the_same_losses(verb, base: Path, tmp_path: Path) -> None:
    arguments = ["model=runs/base/export", "data=en", "optim.steps=3", *SMALL]
    slurm_variables = {
        "SLURM_PROCID": "0",
        "SLURM_LOCALID": "0",
        "SLURM_NTASKS": "1",
        "SLURM_STEP_ID": "0",
        "SLURM_JOB_ID": "7",
        "SLURM_STEP_NODELIST": "localhost",
    }
    launchers = {
        "python": ((), {}),
        "deepspeed": (("deepspeed", "--num_gpus", "2"), {}),
        "torchrun": (TWO_RANKS, {}),
        "slurm": ((), slurm_variables),
    }
    losses_by_launcher = {}
    for name, (command, env) in launchers.items():
        completed = verb("train", f"run={name}", *arguments, start=command, env=env)
        losses_by_launcher[name] = losses(tmp_path / "runs" / name)
        assert "no GPU here: training on the CPU" in completed.stdout
    assert len(losses_by_launcher["python"]) == 3
    for name, launcher_losses in losses_by_launcher.items():
        assert launcher_losses == pytest.approx(losses_by_launcher["python"], rel=1e-5), name
    stage3 = verb("train", "run=z3", *arguments, "zero=stage3", start=TWO_RANKS)
    assert "ZeRO-3" in stage3.stderr
    assert losses(tmp_path / "runs" / "z3") == pytest.approx(losses_by_launcher["python"], rel=1e-5)
    verb("export", "run=z3", "dtype=bf16")


@pytest.mark.slow
@pytest.mark.parametrize("tuning", [["tuning=full"], ["tuning=lora", "tuning.r=4", "tuning.dropout=0.3"]])
def test_an_interrupted_run_resumes_with_the_same_losses(verb, base: Path, tmp_path: Path, tuning: list[str]) -> None:
    arguments = [
        "model=runs/base/export",
        "data=en",
        "optim.steps=6",
        "optim.warmup_steps=0",
        "optim.schedule=constant",
        *SMALL,
        *tuning,
        "checkpoint.every=2",
    ]
    verb("train", "run=whole", *arguments)
    short_arguments = [argument.replace("optim.steps=6", "optim.steps=4") for argument in arguments]
    verb("train", "run=cut", *short_arguments)
    resumed = verb("train", "run=cut", *arguments)
    assert "resumed at step 4" in resumed.stderr
    assert losses(tmp_path / "runs" / "cut") == losses(tmp_path / "runs" / "whole")
    assert sorted(path.name for path in (tmp_path / "runs" / "cut" / "checkpoints").glob("step-*")) == [
        "step-000004",
        "step-000006",
    ]
