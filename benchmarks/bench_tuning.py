"""Trained parameters and their cost: Firefly's two stages on a small LLaMA-2 with an expanded vocabulary, by method and
rows.

    python benchmarks/bench_tuning.py <data folder> [results folder]

The folder holds `tokenizers/llama2_32000.model`, `tokenizers/chinese_llama2_55296.model`, `corpora/` and
`instructions/`. A 2-layer LLaMA learns English and a fifth of Chinese with the 32,000 tokens, is expanded to 55,296,
and goes through the shipped recipes (`firefly_llama2_7b_ext_{cpt,sft}_qlora`) once for every way of training; then a
4-bit load is measured. Everything is done by the verbs, one process, all cores. Writes `tuning_<machine>.{md,csv,png}`.
"""

import csv
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from machine import describe

ROOT = Path(__file__).parents[1]
ARCHITECTURE = (
    "{model_type: llama, hidden_size: 128, intermediate_size: 344, num_hidden_layers: 2, num_attention_heads: 4, "
    "num_key_value_heads: 4, max_position_embeddings: 512, rms_norm_eps: 1.0e-5, tie_word_embeddings: false}"
)
BATCH = ["seq_len=256", "micro_batch_size=4", "global_batch_size=4", "log_every=20", "checkpoint.every=1000"]
BASE_STEPS, CPT_STEPS, SFT_STEPS, HELD_OUT = 600, 100, 50, 100
METHODS = {
    "QLoRA, vocabulary frozen": ["tuning=qlora", "tuning.embeddings=frozen", "tuning.head=frozen"],
    "QLoRA, new rows": ["tuning=qlora", "tuning.embeddings=new_rows", "tuning.head=new_rows"],
    "QLoRA, all rows": ["tuning=qlora", "tuning.embeddings=all", "tuning.head=all"],
    "full, new rows": ["tuning=full", "tuning.embeddings=new_rows", "tuning.head=new_rows"],
    "full, all rows": ["tuning=full", "tuning.embeddings=all", "tuning.head=all"],
}
# A model this small takes a larger rate than 7B; everything else is the recipe's.
RATES = {"cpt": ["optim.lr=2e-3", "optim.warmup_steps=12"], "sft": ["optim.lr=1e-3", "optim.warmup_steps=6"]}
LOADER = """
import sys, threading, time, torch
sys.path[:0] = {paths!r}
from fireflyds import app
from fireflyds.config import Precision
from fireflyds.models import load, tuning
import bitsandbytes, peft
config = app.compose("train", ["run=x", "data=a/b", "optim.steps=1", "model={model}", \
"tuning={tuning}", "hardware=bf16"])
def anonymous():
    text = open("/proc/self/status").read()
    return int(text.split("RssAnon:")[1].split()[0]) / 1024
peak, start, done = 0.0, anonymous(), False
def watch():
    global peak
    while not done:
        peak = max(peak, anonymous())
        time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
options = tuning.quantization_config(config.tuning, Precision.bf16, 2)
model = load.load_model(config.model, load.architecture_of(config.model), Precision.bf16, 0, options).model
done = True; thread.join()
held = sum(p.numel() * p.element_size() for p in model.parameters()) / 2**20
print(f"RESULT {{peak - start:.0f}} {{held:.0f}}")
"""


def verb(folder: Path, name: str, *arguments: str) -> float:
    """Run a verb; its peak memory in MiB."""
    print(name, *arguments, flush=True)
    process = subprocess.Popen([sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments], cwd=folder)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"error: {name} failed")
    return usage.ru_maxrss / 1024


def prepare(folder: Path, data: Path) -> None:
    for name, model in (("base", "llama2_32000"), ("zh", "chinese_llama2_55296")):
        (folder / name).mkdir()
        (folder / name / "tokenizer.model").write_bytes((data / "tokenizers" / f"{model}.model").read_bytes())
    for language, file in (("zh", "clue_corpus_small_sample_zh.txt"), ("en", "wiki_demo_en.txt")):
        lines = [line for line in (data / "corpora" / file).read_text(encoding="utf-8").splitlines() if line.strip()]
        held_out = min(HELD_OUT, len(lines) // 10)
        (folder / f"{language}.txt").write_text("\n".join(lines[:-held_out]), encoding="utf-8")
        (folder / f"{language}_base.txt").write_text("\n".join(lines[: len(lines) // 3]), encoding="utf-8")
        (folder / f"{language}_held_out.txt").write_text("\n".join(lines[-held_out:]), encoding="utf-8")
    # As LLaMA-2 the base has seen a little Chinese, so that its own characters and bytes are not noise.
    base_sources = "data.sources=[{path: en.txt, domain: en}, {path: zh_base.txt, domain: zh}]"
    verb(folder, "prepare", "data=at_path", base_sources, "tokenizer=base", "out=stores/base")
    model_options = [
        "model=at_path",
        "model.init=scratch",
        "model.tokenizer=base",
        f"model.architecture={ARCHITECTURE}",
    ]
    schedule = ["optim.lr=3e-3", f"optim.steps={BASE_STEPS}", "data.weights.en=0.8", "data.weights.zh=0.2"]
    verb(folder, "train", "run=base", *model_options, "data=stores/base", *schedule, *BATCH)
    verb(folder, "export", "run=base")
    pieces = f"pieces={data / 'tokenizers' / 'chinese_llama2_55296.model'}"
    verb(folder, "expand", "base=runs/base/export", pieces, "corpus=zh.txt", "max_vocab_size=55296", "out=expanded")
    cpt_sources = "data.sources=[{path: zh.txt, domain: zh}, {path: en.txt, domain: en}]"
    verb(folder, "prepare", "data=at_path", cpt_sources, "tokenizer=expanded", "out=stores/cpt")
    dialogue_sources = ", ".join(
        f"{{path: {data / 'instructions' / name}}}" for name in ("oaast_sft_zh.json", "alpaca_zh_demo.json")
    )
    verb(
        folder,
        "prepare",
        "data=at_path",
        f"data.sources=[{dialogue_sources}]",
        "tokenizer=expanded",
        "template=firefly",
        "out=stores/sft",
    )


def train(folder: Path, method: str, stage: str, model: str, steps: int) -> dict[str, Any]:
    run = f"{stage}-{list(METHODS).index(method)}"
    recipe = [
        f"experiment=firefly_llama2_7b_ext_{stage}_qlora",
        "hardware=cpu",
        f"model={model}",
        f"data=stores/{stage}",
    ]
    memory = verb(
        folder, "train", f"run={run}", *recipe, *METHODS[method], *RATES[stage], f"optim.steps={steps}", *BATCH
    )
    verb(folder, "export", f"run={run}")
    verb(
        folder,
        "evaluate",
        f"model=runs/{run}/export",
        "tasks=[bits_per_byte]",
        "bits_per_byte.texts.zh=zh_held_out.txt",
        "bits_per_byte.texts.en=en_held_out.txt",
    )
    results = json.loads((folder / "runs" / run / "export" / "eval" / "scores.json").read_text())["results"]
    rows = [json.loads(line) for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]
    manifest = json.loads((folder / "stores" / stage / "manifest.json").read_text())["totals"]
    table = json.loads(
        subprocess.run(
            [
                sys.executable,
                str(ROOT / "launch" / "plan.py"),
                *recipe[:3],
                *METHODS[method],
                "optim.steps=1",
                "format=json",
            ],
            cwd=folder,
            check=True,
            capture_output=True,
            text=True,
        ).stdout
    )
    checkpoint = next((folder / "runs" / run / "checkpoints").glob("step-*"))
    return {
        "run": run,
        "memory": memory,
        "trained": table["trainable_parameters"],
        "state": sum(row["memory_bytes"] for row in table["groups"][:-1]),
        "checkpoint": sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()),
        "speed": statistics.median(row["tokens_per_second"] for row in rows[5:]),
        # Bits per byte of text: from one vocabulary to another, losses per token do not compare.
        "curve": [row["loss"] / math.log(2) * manifest["tokens"] / manifest["bytes"] for row in rows],
        "scores": results[-1]["figures"],
    }


def loading(folder: Path) -> list[str]:
    """Peak of anonymous memory while a base of several shards is loaded, next to what the model then holds."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    settings = LlamaConfig(
        vocab_size=8192,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=16,
        num_attention_heads=8,
        tie_word_embeddings=False,
    )
    large = folder / "large"
    LlamaForCausalLM(settings).to(torch.bfloat16).save_pretrained(large, max_shard_size="80MB")
    shards = [file.stat().st_size / 2**20 for file in large.glob("*.safetensors")]
    lines = [
        "\n"
        f"A base of {sum(shards):,.0f} MiB in {len(shards)} shards of at most {max(shards):.0f} MiB, loaded on the "
        "CPU: anonymous memory at its peak over the libraries' own, and what the model's parameters hold.\n",
        "| | peak MiB | parameters MiB |",
        "|---|---|---|",
    ]
    for tuning in ("lora", "qlora"):
        code = LOADER.format(paths=[str(ROOT), str(ROOT / "kernels")], model=large, tuning=tuning)
        # Freed memory is returned immediately, so that the peak is memory in use.
        environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "1048576"}
        completed = subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True, env=environment
        )
        peak, parameter_mib = next(line for line in completed.stdout.splitlines() if line.startswith("RESULT")).split()[
            1:
        ]
        lines.append(f"| {tuning} | {peak} | {parameter_mib} |")
    return lines


def chart(curves: dict[str, dict[str, list[float]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), dpi=120)
    for axes, (stage, methods) in zip(panels, curves.items(), strict=True):
        for method, curve in methods.items():
            means = [statistics.mean(curve[max(0, index - 9) : index + 1]) for index in range(len(curve))]
            axes.plot(range(1, len(means) + 1), means, label=method, linewidth=1.2)
        axes.set(xlabel="step", ylabel="bits per byte (mean of ten steps)", title=stage)
        axes.grid(alpha=0.3)
    panels[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path)


def main(data: Path, out: Path) -> None:
    start = time.time()
    out.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, dict[str, Any]]] = {"cpt": {}, "sft": {}}
    with tempfile.TemporaryDirectory() as temporary_folder:
        folder = Path(temporary_folder)
        prepare(folder, data)
        for method in METHODS:
            results["cpt"][method] = train(folder, method, "cpt", "expanded", CPT_STEPS)
            model = f"runs/{results['cpt'][method]['run']}/export"
            results["sft"][method] = train(folder, method, "sft", model, SFT_STEPS)
        loading_lines = loading(folder)
    name = f"tuning_cpu{os.cpu_count()}_{date.today():%Y%m}"
    with (out / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(["stage", "way", "step", "bits_per_byte"])
        for stage, methods in results.items():
            for method, result in methods.items():
                writer.writerows([stage, method, step, f"{value:.4f}"] for step, value in enumerate(result["curve"], 1))
    chart(
        {
            "continued pre-training": {method_name: costs["curve"] for method_name, costs in results["cpt"].items()},
            "instruction tuning": {method_name: costs["curve"] for method_name, costs in results["sft"].items()},
        },
        out / f"{name}.png",
    )
    machine = describe("torch", "transformers", "deepspeed", "peft", "bitsandbytes")
    lines = [
        f"# What trains\n\n{machine}\n",
        __doc__[__doc__.index("A 2-layer") :],
        "| stage | way | trained | state MiB | checkpoint MiB | peak MiB | tokens/s | bits/byte zh | en |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for stage, methods in results.items():
        for method, costs in methods.items():
            lines.append(
                f"| {stage} | {method} | {costs['trained']:,} | {costs['state'] / 2**20:.0f} | "
                f"{costs['checkpoint'] / 2**20:.0f} | {costs['memory']:.0f} | {costs['speed']:,.0f} | "
                f"{costs['scores']['zh']:.3f} | {costs['scores']['en']:.3f} |"
            )
    lines += [
        "\n"
        "trained: parameters. state: their weights, gradients and optimizer states. peak: the process's, libraries "
        f"included. Bits per byte on held-out documents (a tenth, at most {HELD_OUT}). Everything took "
        f"{time.time() - start:.0f} s.",
        *loading_lines,
    ]
    (out / f"{name}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main(
        Path(sys.argv[1]).resolve(),
        Path(sys.argv[2] if len(sys.argv) > 2 else ROOT / "benchmarks" / "results").resolve(),
    )
