"""Planned memory next to measured: models of 50 to 110 million parameters on the CPU, of 1 to 7 billion on a GPU.

    python benchmarks/bench_plan.py [results folder]

Every setting runs in processes of its own: the engine is built as `launch/train.py` builds it and takes two steps over
packed random documents. On the CPU the peak is that of anonymous memory over what the process held after a step of a
tiny model (libraries, thread pools), of the rank with most; on a GPU it is `max_memory_allocated`. Writes
`plan_<machine>.{md,csv}`; a setting with a row in the csv is not measured again.
"""

import contextlib
import csv
import gc
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

ROOT = Path(__file__).parents[1]
SHAPES = {
    "tiny": (64, 32, 64, 2, 2),
    "67M": (16000, 768, 2048, 6, 12),
    "111M": (32000, 1024, 2816, 4, 16),
    "1.1B": (32000, 2048, 5632, 22, 32),
    "7B": (55296, 4096, 11008, 32, 32),
}
# Model, ranks, rows of a step, options. Two micro-batches in a step, so that gradients add up.
CPU = [
    ("67M", 1, 2, "zero=0 hardware=cpu seq_len=1024"),
    ("67M", 1, 2, "zero=0 hardware=bf16 seq_len=1024"),
    ("67M", 1, 2, "zero=2 hardware=cpu seq_len=1024"),
    ("67M", 1, 2, "zero=2 hardware=bf16 seq_len=1024"),
    ("67M", 1, 2, "zero=2 hardware=cpu seq_len=2048 hardware.gradient_checkpointing=true"),
    ("67M", 1, 2, "zero=3 hardware=bf16 seq_len=2048"),
    ("67M", 2, 4, "zero=1 hardware=cpu seq_len=1024"),
    ("67M", 2, 4, "zero=2 hardware=bf16 seq_len=2048"),
    ("67M", 2, 4, "zero=3 hardware=cpu seq_len=1024"),
    ("67M", 1, 2, "zero=1 hardware=cpu seq_len=1024 optim=muon"),
    ("111M", 1, 2, "zero=2 hardware=cpu seq_len=1024 tuning=lora"),
    ("111M", 1, 2, "zero=0 hardware=bf16 seq_len=2048 tuning=lora hardware.gradient_checkpointing=true"),
    ("111M", 1, 4, "zero=2 hardware=bf16 seq_len=1024 micro_batch_size=2 tuning=qlora"),
    (
        "111M",
        1,
        2,
        (
            "zero=2 hardware=bf16 seq_len=4096 tuning=qlora tuning.embeddings=all tuning.head=all "
            "hardware.gradient_checkpointing=true"
        ),
    ),
    ("111M", 2, 4, "zero=1 hardware=bf16 seq_len=2048 tuning=lora tuning.head=all"),
    ("111M", 1, 2, "zero=2 hardware=cpu seq_len=1024 zero.offload_optimizer=cpu"),
]
GPU = [
    ("1.1B", 1, 2, "zero=1 hardware=bf16 seq_len=4096"),
    ("1.1B", 1, 2, "zero=3 hardware=bf16 seq_len=4096 hardware.gradient_checkpointing=true"),
    (
        "1.1B",
        1,
        8,
        "zero=2 hardware=bf16 seq_len=4096 micro_batch_size=4 tuning=lora hardware.gradient_checkpointing=true",
    ),
    ("7B", 1, 2, "zero=1 hardware=bf16 seq_len=2048 hardware.gradient_checkpointing=true"),
    ("7B", 1, 2, "zero=2 hardware=bf16 seq_len=4096 tuning=qlora"),
    (
        "7B",
        1,
        8,
        "zero=2 hardware=bf16 seq_len=4096 micro_batch_size=4 tuning=qlora tuning.embeddings=all tuning.head=all "
        "hardware.gradient_checkpointing=true",
    ),
]
DOCUMENTS = 4
"""In a row."""


def architecture(name: str) -> dict[str, Any]:
    vocab_size, hidden_size, intermediate_size, layers, heads = SHAPES[name]
    return {
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
    }


class PeakMemory:
    """The peak of this process's anonymous memory; on a GPU that of torch's allocator."""

    def __init__(self) -> None:
        self.initial, self.peak = anonymous_bytes(), 0
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_bytes())
            time.sleep(0.002)

    def bytes(self) -> int:
        import torch

        return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else self.peak - self.initial


def anonymous_bytes() -> int:
    return int(Path("/proc/self/status").read_text().split("RssAnon:")[1].split()[0]) * 1024


class RandomRows:
    """Documents of equal length, each with a label everywhere but at its end."""

    def __init__(self, config: Any, vocab_size: int, accumulation: int) -> None:
        self.config, self.vocab_size, self.accumulation = config, vocab_size, accumulation

    def steps(self, first: int, end: int) -> Any:
        for step in range(first, end):
            yield [self.batch(step * self.accumulation + index) for index in range(self.accumulation)]

    def documents(self, number: int, micro: int) -> str:
        return f"documents of micro-batch {micro} of step {number}"

    def batch(self, seed: int) -> Any:
        import torch

        from fireflyds.types import PackedBatch

        count, length = self.config.micro_batch_size * DOCUMENTS, self.config.seq_len // DOCUMENTS
        ids = torch.randint(0, self.vocab_size, (count, length), generator=torch.Generator().manual_seed(seed))
        return PackedBatch.from_documents(ids.tolist())


def train(overrides: list[str], steps: int) -> dict[str, Any]:
    """Trains for `steps` steps; returns the memory estimate."""
    from fireflyds import app
    from fireflyds.distributed import launcher_env
    from fireflyds.metrics.accumulator import MetricsContext
    from fireflyds.metrics.flops import step_flops
    from fireflyds.models import load
    from fireflyds.models.precision import resolve_precision
    from fireflyds.optim.param_groups import parameter_groups
    from fireflyds.planner import memory
    from fireflyds.planner.model_shape import model_shape
    from fireflyds.train.loop import train_steps
    from fireflyds.train.objectives import load_objective
    from fireflyds.train.trainer import build_model
    from fireflyds.types import TrainState
    from fireflyds.zero.engine import build_engine, pick_accelerator

    rank_info = launcher_env.rank_from_environment(os.environ)
    config = app.compose("train", ["run=x", "data=a/b", "optim.steps=9", "optim.schedule=constant", *overrides])
    precision = resolve_precision(config.hardware)
    accumulation = config.accumulation_steps(rank_info.world_size)
    hf_config = load.architecture_of(config.model)
    model = build_model(config, hf_config, precision)
    placement = memory.placement_of(config, rank_info.world_size, accumulation)
    device = "cuda" if pick_accelerator() else "cpu"
    estimate = memory.estimate(model_shape(model, config), config, precision, placement, device)
    names = [group.name for group in parameter_groups(model, config)]
    token_bytes = np.zeros(hf_config.vocab_size, np.int32)
    metrics_context = MetricsContext(
        ["text"], token_bytes, names, config.global_batch_size * config.seq_len, step_flops(model), None
    )
    engine = build_engine(model, config, precision, accumulation)
    rows = RandomRows(config, hf_config.vocab_size, accumulation)
    for _ in train_steps(engine, load_objective(config.objective), rows, TrainState(), config, steps, metrics_context):
        pass
    return {"planned": estimate.total, "moment": estimate.moment, "items": estimate.items}


def child(out: Path, folder: Path, name: str, options: list[str]) -> None:
    """One rank of a setting."""
    import torch

    from fireflyds.distributed import collectives, launcher_env
    from fireflyds.zero.engine import init_distributed

    rank_info = launcher_env.rank_from_environment(os.environ)
    init_distributed(rank_info, 10)
    warmup_options = [option for option in options if not option.startswith("seq_len")]
    train([*model(folder, "tiny", warmup_options), *warmup_options, "seq_len=64"], 1)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    peak = PeakMemory()
    result = train([*model(folder, name, options), *options], 2)
    out.with_suffix(f".{rank_info.rank}").write_text(json.dumps(result | {"measured": peak.bytes()}))
    collectives.exit_process(0)


def model(folder: Path, name: str, options: list[str]) -> list[str]:
    """A model from scratch, or one on the disk where it is to be quantised."""
    if any("qlora" in option for option in options):
        return [f"model={folder / name}"]
    settings = ", ".join(
        f"{key}: {str(value).lower() if isinstance(value, bool) else value}"
        for key, value in architecture(name).items()
    )
    return ["model=at_path", "model.init=scratch", "model.tokenizer=none", f"model.architecture={{{settings}}}"]


def save_model(folder: Path, name: str) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / name).exists():
        torch.manual_seed(0)
        settings = {key: value for key, value in architecture(name).items() if key != "model_type"}
        # On the CPU weights of the wanted number format stay mapped from their file, and would not be anonymous.
        torch.set_default_dtype(torch.bfloat16 if torch.cuda.is_available() else torch.float32)
        LlamaForCausalLM(LlamaConfig(**settings)).save_pretrained(folder / name)
        torch.set_default_dtype(torch.float32)


def measure(folder: Path, name: str, num_ranks: int, rows: int, options: str) -> dict[str, Any]:
    options_of_setting = [*options.split(), f"global_batch_size={rows}", "optim.lr=1e-4"]
    print(name, num_ranks, *options_of_setting, flush=True)
    if "qlora" in options:
        save_model(folder, "tiny")
        save_model(folder, name)
    out = folder / "found"
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node", str(num_ranks), "--master_port", "29655"]
    # Freed memory is returned immediately, so that the peak is memory in use.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "MALLOC_TRIM_THRESHOLD_": "1048576",
        "MALLOC_ARENA_MAX": "2",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "FIREFLYDS_BENCH_PLAN": json.dumps([str(out), str(folder), name, options_of_setting]),
    }
    subprocess.run([sys.executable, *torchrun, __file__], check=True, env=environment)
    results = [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(num_ranks)]
    return max(results, key=lambda result: result["measured"])


def _number(text: str) -> str | int | float:
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return kind(text)
    return text


def main(results: Path) -> None:
    import torch

    settings = GPU if torch.cuda.is_available() else CPU
    machine = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu2"
    stem = results / f"plan_{machine.lower().replace(' ', '_')}_{date.today():%Y%m}"
    table, rows = stem.with_suffix(".csv"), []
    if table.exists():
        with table.open(encoding="utf-8") as stream:
            rows = [{key: _number(value) for key, value in row.items()} for row in csv.DictReader(stream)]
    with tempfile.TemporaryDirectory() as folder:
        for name, num_ranks, step, options in settings:
            if (name, num_ranks, options) in [(row["model"], row["ranks"], row["options"]) for row in rows]:
                continue
            result = measure(Path(folder), name, num_ranks, step, options)
            items = {item: round(size / 2**20) for item, size in result["items"].items()}
            rows.append(
                {
                    "model": name,
                    "ranks": num_ranks,
                    "options": options,
                    "planned_mib": round(result["planned"] / 2**20),
                    "measured_mib": round(result["measured"] / 2**20),
                    "planned_over_measured": round(result["planned"] / result["measured"], 3),
                    "moment": result["moment"],
                }
                | items
            )
            with table.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, list(rows[0]))
                writer.writeheader()
                writer.writerows(rows)
    bound = 0.10 if torch.cuda.is_available() else 0.15
    num_within = sum(abs(row["planned_over_measured"] - 1) <= bound for row in rows)
    lines = [
        "# Planned memory and measured",
        "",
        describe("torch", "transformers", "deepspeed", "peft", "bitsandbytes"),
        "",
        f"Peak of one rank, MiB; {num_within} of {len(rows)} within {bound:.0%}. Two micro-batches a step, two steps, "
        "four documents a row. The moment is the one that the plan takes for the highest.",
        "",
        "| model | ranks | options | planned | measured | ratio | moment |",
        "|---|---|---|---|---|---|---|",
        *(
            f"| {row['model']} | {row['ranks']} | `{row['options']}` | {row['planned_mib']:,} | "
            f"{row['measured_mib']:,} | {row['planned_over_measured']:.2f} | {row['moment']} |"
            for row in rows
        ),
    ]
    stem.with_suffix(".md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    if "FIREFLYDS_BENCH_PLAN" in os.environ:
        result_path, models_folder, model_name, model_options = json.loads(os.environ["FIREFLYDS_BENCH_PLAN"])
        child(Path(result_path), Path(models_folder), model_name, model_options)
    else:
        main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "benchmarks" / "results")
