"""A smoke test of the real thing on the GPU at hand: the verbs, DeepSpeed and NCCL, in under 90 seconds.

    python benchmarks/gpu_smoke.py [folder] [--seconds 90] [--small]

Writes a corpus, learns a tokenizer, prepares, trains two layers of TinyLlama (random weights, all parameters),
kills it behind its first checkpoint, resumes it, exports it, evaluates the export, trains QLoRA on it and exports that.
Every line is a verb as a user would give it. `smoke_<device>_<yyyymm>.md` there is written after every step, so that
what was seen remains when the time is up. `--small` takes a tiny model: a rehearsal on a CPU.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
SHAPE = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2, "num_attention_heads": 32}
SMALL_SHAPE = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
Step = tuple[str, list[str]]


def steps(shape: dict[str, int], tokens: int) -> list[Step]:
    """The verbs in order, each with its arguments; `killed` steps are ended behind their first checkpoint."""
    architecture = ", ".join(f"{key}: {value}" for key, value in {"model_type": "llama", **shape}.items())
    scratch = [
        "model=at_path",
        "model.init=scratch",
        "model.tokenizer=tokenizer",
        f"model.architecture={{{architecture}}}",
    ]
    rows = [f"seq_len={tokens}", "micro_batch_size=2", "global_batch_size=4", "log_every=1"]
    full = ["train", "run=full", *scratch, "data=store", "zero=1", "optim.steps=8", "checkpoint.every=3", *rows]
    qlora = [
        "train",
        "run=qlora",
        "model=runs/full/export",
        "data=store",
        "tuning=qlora",
        "zero=2",
        "optim.steps=4",
        *rows,
    ]
    return [
        ("corpus", ["synthesize", "out=corpus"]),
        ("tokenizer", ["learn", "corpus=corpus/zh.jsonl", "kind=byte_level", "vocab_size=2048", "out=tokenizer"]),
        ("store", ["prepare", "data=corpus/zh.jsonl", "tokenizer=tokenizer", "out=store"]),
        ("full, killed", full),
        ("full, resumed", full),
        ("export", ["export", "run=full"]),
        (
            "evaluate",
            ["evaluate", "model=runs/full/export", "limit=50", "bits_per_byte.texts.zh=corpus/zh_heldout.jsonl"],
        ),
        ("qlora", qlora),
        ("export of qlora", ["export", "run=qlora", "out=merged"]),
    ]


def run_step(name: str, arguments: list[str], folder: Path, until: float) -> tuple[bool, str]:
    """Runs a verb until the time `until`. Returns whether it did what it should, and its last line."""
    command = [sys.executable, str(ROOT / "launch" / f"{arguments[0]}.py"), *arguments[1:]]
    log = folder / f"{name.replace(', ', '_').replace(' ', '_')}.log"
    killed = name.endswith("killed")
    with log.open("w") as stream:
        process = subprocess.Popen(command, cwd=folder, stdout=stream, stderr=stream, start_new_session=True)
        checkpoint = folder / "runs" / "full" / "checkpoints"
        while process.poll() is None and time.monotonic() < until:
            if killed and any(checkpoint.glob("step-*/checksums.json")):
                break
            time.sleep(0.05)
        ended = process.poll()
        if ended is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
    if killed:
        return any(
            checkpoint.glob("step-*/checksums.json")
        ), f"killed behind {sorted(p.name for p in checkpoint.glob('step-*'))}"
    return ended == 0, ("the time is up: " if ended is None else "") + lines[-1]


def main(folder: Path, seconds: float, small: bool) -> int:
    """Runs the steps and writes the table. Returns the exit code."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    short = device.lower().removeprefix("nvidia ").replace(" ", "-")
    folder.mkdir(parents=True, exist_ok=True)
    out = folder / f"smoke_{short}_{date.today():%Y%m}.md"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers", "deepspeed"))
    rows, failed, started = [], False, time.monotonic()
    with tempfile.TemporaryDirectory() as work:
        for name, arguments in steps(SMALL_SHAPE if small else SHAPE, 128 if small else 1024):
            before = time.monotonic()
            succeeded, line = run_step(name, arguments, Path(work), started + seconds)
            failed |= not succeeded
            rows.append(
                f"| {name} | {'ok' if succeeded else 'FAILED'} | {time.monotonic() - before:.1f} | {line[-200:]} |"
            )
            print(rows[-1], flush=True)
            metrics = Path(work) / "runs" / "full" / "metrics.jsonl"
            losses = [json.loads(text)["loss"] for text in metrics.read_text().splitlines()] if metrics.exists() else []
            out.write_text(
                f"# The verbs on {device}\n\n{versions}, {date.today().isoformat()}. Losses of the full-parameter run: "
                f"{', '.join(f'{loss:.3f}' for loss in losses)}.\n\n"
                "| step | | seconds | last line |\n|---|---|---:|---|\n" + "\n".join(rows) + "\n"
            )
            if failed:
                break
    return int(failed)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "results")
    parser.add_argument("--seconds", type=float, default=90)
    parser.add_argument("--small", action="store_true")
    arguments = parser.parse_args()
    sys.exit(main(arguments.folder, arguments.seconds, arguments.small))
