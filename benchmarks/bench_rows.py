"""Losses of continued pre-training after expansion, by the initialisation of new rows.

    python benchmarks/bench_rows.py en.txt zh.txt out_folder

A small LLaMA is trained on English and Chinese with an English tokenizer, expanded three times with the same pieces,
and trained on the same batches of unseen Chinese. Everything is done by the verbs. Writes `rows_<...>.csv` and `.md`
lines.
"""

import csv
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from machine import describe

ROOT = Path(__file__).parents[1]
INITS = ("random", "mean", "weighted")
ARCHITECTURE = (
    "{model_type: llama, hidden_size: 192, intermediate_size: 512, num_hidden_layers: 3, num_attention_heads: 6, "
    "num_key_value_heads: 6, max_position_embeddings: 512, tie_word_embeddings: false}"
)
BATCH = ["seq_len=256", "micro_batch_size=8", "global_batch_size=16", "log_every=10"]
BASE_STEPS, CPT_STEPS = 500, 80


def verb(folder: Path, name: str, *arguments: str) -> None:
    print(name, *arguments, flush=True)
    subprocess.run([sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments], cwd=folder, check=True)


def losses(folder: Path, run: str) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def main() -> None:
    english, chinese, out = (Path(argument).resolve() for argument in sys.argv[1:4])
    with tempfile.TemporaryDirectory() as temporary_folder:
        folder = Path(temporary_folder)
        documents = [line for line in chinese.read_text(encoding="utf-8").splitlines() if line.strip()]
        half = len(documents) // 2
        (folder / "zh_base.txt").write_text("\n".join(documents[:half]), encoding="utf-8")
        (folder / "zh_cpt.txt").write_text("\n".join(documents[half:]), encoding="utf-8")
        (folder / "en.txt").write_bytes(english.read_bytes())
        verb(folder, "learn", "corpus=en.txt", "vocab_size=4096", "out=tokenizer")
        sources = "data.sources=[{path: en.txt, domain: en}, {path: zh_base.txt, domain: zh}]"
        verb(folder, "prepare", "data=at_path", sources, "tokenizer=tokenizer", "out=base_store")
        model_options = [
            "model=at_path",
            "model.init=scratch",
            "model.tokenizer=tokenizer",
            f"model.architecture={ARCHITECTURE}",
        ]
        schedule = ["optim.lr=2e-3", f"optim.steps={BASE_STEPS}"]
        verb(folder, "train", "run=base", *model_options, "data=base_store", *schedule, *BATCH)
        verb(folder, "export", "run=base")
        curves = {}
        for init in INITS:
            verb(
                folder,
                "expand",
                "base=runs/base/export",
                "corpus=zh_base.txt",
                "num_pieces=3000",
                f"init={init}",
                f"out={init}",
            )
            if init == INITS[0]:
                verb(folder, "prepare", "data=zh_cpt.txt", f"tokenizer={init}", "out=cpt_store")
            schedule = ["optim.lr=5e-4", f"optim.steps={CPT_STEPS}"]
            verb(folder, "train", f"run={init}", f"model={init}", "data=cpt_store", *schedule, *BATCH)
            curves[init] = losses(folder, init)
    out.mkdir(parents=True, exist_ok=True)
    with (out / "rows_cpu2_202611.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", *INITS])
        writer.writerows(
            [step, *(f"{curves[init][step - 1]:.4f}" for init in INITS)] for step in range(1, CPT_STEPS + 1)
        )
    reported_steps = [step for step in (1, 2, 5, 10, 20, 40, 80) if step <= CPT_STEPS]
    lines = [
        "# New rows: loss of continued pre-training",
        "",
        describe("torch", "transformers", "deepspeed"),
        "",
        f"A LLaMA of 3 layers and 192 columns with 4,096 English pieces, {BASE_STEPS} steps of 4,096 tokens on "
        f"English and Chinese; about 3,000 Chinese rows added three times; the same {CPT_STEPS} steps on unseen "
        "Chinese (lr 5e-4). Baseline: `random`, a normal with the old rows' mean and covariance. All steps: the CSV "
        "beside this file.",
        "",
        "| init | " + " | ".join(f"step {step}" for step in reported_steps) + " |",
        "|---|" + "---:|" * len(reported_steps),
        *(
            f"| {init} | " + " | ".join(f"{curves[init][step - 1]:.3f}" for step in reported_steps) + " |"
            for init in INITS
        ),
    ]
    (out / "rows_cpu2_202611.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
