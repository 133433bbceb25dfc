"""Training on 2 ranks of a CPU: fireflyds, Hugging Face's Trainer and TRL's SFTTrainer, all under DeepSpeed ZeRO-2.

    python benchmarks/bench_train.py <data folder> [results folder] [--rounds 3] [--seq-len 2048] [--quick]

The folder holds `corpora/` and `instructions/`. Real documents and dialogues become one token store; the packed rows
that our loader takes from it are exported as documents for the others, so that every contender learns the same tokens
in as many steps. Contenders take turns, round by round, each a fresh process per rank. Peers that are not installed are
named (`requirements-train.txt`). Writes `train_cpu<cores>_<yyyymm>.{md,csv}`. `bench_train_gpu.py` is for a GPU.
"""

import argparse
import csv
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from datetime import date
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timing
from machine import describe
from train_turn import IGNORE_INDEX, Turn

ROOT, BENCHMARKS = Path(__file__).parents[1], Path(__file__).parent
VOCAB, RANKS = 8192, 2
SHAPES = {
    "tiny": {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4},
    "small": {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4},
}
# What it runs, what it must be able to import, and how many times faster ours is to be.
CONTENDERS: dict[str, tuple[list[str], str, float | None]] = {
    "ours": (["train_ours.py"], "fireflyds", None),
    "HF Trainer, padded": (["train_hf.py", "padded"], "transformers", 6.0),
    "HF Trainer, packed by position_ids": (["train_hf.py", "packed"], "transformers", 1.8),
    "TRL SFTTrainer, packing bfd": (["train_trl.py", "bfd"], "trl", 2.0),
    "TRL SFTTrainer, padded": (["train_trl.py", "padded"], "trl", 2.0),
}
FIELDS = (
    "model round contender tokens_per_second learned_tokens_per_second learned_tokens_per_processor_second "
    "learned_tokens peak_mb last_loss load"
)
COLUMNS = (
    "|learned tokens/s|least to most|tokens/s|ours is faster by|asked|by processor time|peak memory, MB|learned in all|"
    "loss, first|last"
).split("|")
TurnResult = dict[str, Any]


@dataclass(frozen=True, slots=True)
class BenchmarkPlan:
    """How much is measured."""

    shapes: tuple[str, ...]
    seq_len: int
    accumulation: int
    warmup: int
    steps: int
    rounds: int
    overhead_steps: int


def call(folder: Path, *command: str, limit: float = 1800) -> None:
    """Runs a command; its output is printed only if it fails."""
    log = folder / "last.log"
    with log.open("w") as stream:
        completed = subprocess.run(
            command, cwd=folder, stdout=stream, stderr=subprocess.STDOUT, timeout=limit, check=False
        )
    if completed.returncode:
        sys.exit(
            f"{log.read_text(errors='replace')[-4000:]}\nerror: {' '.join(command)} failed ({completed.returncode})"
        )


def verb(folder: Path, name: str, *arguments: str) -> None:
    call(folder, sys.executable, str(ROOT / "launch" / f"{name}.py"), *arguments)


def ranks(folder: Path, script: str, *arguments: str) -> None:
    """A script on all ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(RANKS)]
    call(folder, *torchrun, str(BENCHMARKS / script), *arguments)


def make_store(folder: Path, data: Path) -> None:
    """A tokenizer of 8,192 pieces, and one store of documents and dialogues."""
    names = ("clue_corpus_small_sample_zh.txt", "wiki_demo_en.txt")
    texts = [(data / "corpora" / name).read_text(encoding="utf-8") for name in names]
    (folder / "corpus.txt").write_text("\n".join(texts), encoding="utf-8")
    verb(folder, "learn", "corpus=corpus.txt", f"vocab_size={VOCAB}", "out=tokenizer")
    dialogues = [data / "instructions" / name for name in ("oaast_sft_zh.json", "alpaca_zh_demo.json")]
    sources = ", ".join(f"{{path: {path}}}" for path in (data / "corpora" / names[0], *dialogues))
    made_from = [f"data.sources=[{sources}]", "tokenizer=tokenizer", "template=firefly"]
    verb(folder, "prepare", "data=at_path", *made_from, "out=store")


def make_model(folder: Path, shape: str) -> str:
    """The same random weights for all."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    settings = LlamaConfig(
        vocab_size=VOCAB, max_position_embeddings=4096, tie_word_embeddings=False, pad_token_id=0, **SHAPES[shape]
    )
    LlamaForCausalLM(settings).save_pretrained(folder / shape)
    return str(folder / shape)


def export_documents(turn: Turn) -> dict[str, float]:
    """Writes the documents of the rows that fireflyds trains on to `turn.documents`; returns their statistics."""
    from train_ours import overrides

    from fireflyds import app
    from fireflyds.data.pack.loader import collate
    from fireflyds.data.pack.mixture import PackedRowSampler
    from fireflyds.data.store.store import TokenStore

    config = app.compose("train", overrides(turn))
    store = TokenStore(turn.store)
    sequence = PackedRowSampler(store, config.seq_len, config.seed, config.data)
    ids, labels, lengths, rows = [], [], [], []
    for row in range(turn.rows):
        slices = sequence.row(row)
        for number in range(len(slices)):
            batch = collate(store, slices.take(np.array([number])))
            ids.append(batch.input_ids[0].numpy())
            shifted = batch.labels[0].numpy()
            labels.append(np.concatenate([[IGNORE_INDEX], shifted[:-1]]))
            lengths.append(int(slices.lengths[number]))
            rows.append(row)
    bounds = np.concatenate([[0], np.cumsum(lengths)])
    flat = np.concatenate(labels)
    np.savez(turn.documents, ids=np.concatenate(ids), labels=flat, bounds=bounds, rows=np.array(rows))
    return {
        "documents": len(rows),
        "tokens": int(bounds[-1]),
        "learned": int((flat != IGNORE_INDEX).sum()),
        "longest": max(lengths),
        "median": statistics.median(lengths),
        "fill": bounds[-1] / turn.rows / turn.seq_len,
    }


def take_turn(folder: Path, turn: Turn, name: str, warmup: int) -> TurnResult:
    """One contender, once."""
    turn_folder = Path(tempfile.mkdtemp(dir=folder))
    turn_settings = asdict(turn) | {"folder": str(turn_folder)}
    (turn_folder / "turn.json").write_text(json.dumps(turn_settings), encoding="utf-8")
    script, *arguments = CONTENDERS[name][0]
    ranks(turn_folder, script, str(turn_folder / "turn.json"), *arguments)
    records = [json.loads((turn_folder / f"rank{rank}.json").read_text()) for rank in range(RANKS)]
    if any(len(record["seconds"]) != turn.steps for record in records):
        sys.exit(f"error: {name} took {len(records[0]['seconds'])} steps, not {turn.steps}")
    seconds = sum(records[0]["seconds"][warmup:])
    processor_seconds = sum(sum(r["processor_seconds"][warmup:]) for r in records)
    return {
        "tokens": sum(sum(r["tokens"][warmup:]) for r in records) / seconds,
        "learned": sum(sum(r["learned"][warmup:]) for r in records) / seconds,
        "per_processor": sum(sum(r["learned"][warmup:]) for r in records) / processor_seconds,
        "all_learned": sum(sum(r["learned"]) for r in records),
        "megabytes": max(r["megabytes"] for r in records),
        "losses": {int(step): loss for step, loss in records[0]["losses"].items()},
        "load": os.getloadavg()[0],
    }


def measure(folder: Path, shape: str, plan: BenchmarkPlan, out: list[list[Any]]) -> str:
    """All contenders on one model; a Markdown table."""
    turn = Turn(
        folder="",
        model=make_model(folder, shape),
        store=str(folder / "store"),
        tokenizer=str(folder / "tokenizer"),
        documents=str(folder / "documents.npz"),
        seq_len=plan.seq_len,
        steps=plan.warmup + plan.steps,
        accumulation=plan.accumulation,
        world_size=RANKS,
        lr=1e-3,
        reduce_bucket_size=50_000_000,
    )
    summary_of_documents = export_documents(turn)
    available = [name for name, (_, package, _) in CONTENDERS.items() if find_spec(package)]
    results: dict[str, list[TurnResult]] = {name: [] for name in available}
    for number in range(plan.rounds):
        # Rotated, so that no contender always follows the slowest.
        for name in available[number % len(available) :] + available[: number % len(available)]:
            result = take_turn(folder, turn, name, plan.warmup)
            results[name].append(result)
            summary = f"{result['learned']:,.0f} learned tokens/s, {result['megabytes']:,.0f} MB"
            print(f"{shape}, round {number + 1}, {name}: {summary}", flush=True)
            out.append(
                [
                    shape,
                    number + 1,
                    name,
                    f"{result['tokens']:.1f}",
                    f"{result['learned']:.1f}",
                    f"{result['per_processor']:.1f}",
                    result["all_learned"],
                    f"{result['megabytes']:.0f}",
                    f"{result['losses'].get(turn.steps, float('nan')):.4f}",
                    f"{result['load']:.2f}",
                ]
            )
    title = (
        f"{shape}: LLaMA of {SHAPES[shape]['num_hidden_layers']} layers, d = {SHAPES[shape]['hidden_size']}, V = "
        f"{VOCAB:,}; {summary_of_documents['documents']:,.0f} documents and dialogues, "
        f"{summary_of_documents['tokens']:,.0f} tokens "
        f"({summary_of_documents['learned']:,.0f} learned)"
    )
    note = (
        f"Median length {summary_of_documents['median']:,.0f}, longest {summary_of_documents['longest']:,.0f}; "
        f"rows of {plan.seq_len:,} tokens, "
        f"{summary_of_documents['fill']:.1%} full; {plan.accumulation} accumulated; "
        f"{plan.warmup} steps of warm-up, {plan.steps} measured.\n"
    )
    return timing.table(title, COLUMNS, [row_of(name, results) for name in CONTENDERS]) + "\n" + note


def row_of(name: str, results: dict[str, list[TurnResult]]) -> list[str]:
    """A line of the table: medians over the rounds; the ratio is the median of the rounds' ratios."""
    target = CONTENDERS[name][2]
    if name not in results:
        return [name, "not installed", *[""] * (len(COLUMNS) - 2)]
    turns = results[name]
    ratio, by_processor = (
        statistics.median(
            fireflyds_result[metric] / peer_result[metric]
            for fireflyds_result, peer_result in zip(results["ours"], turns, strict=True)
        )
        for metric in ("learned", "per_processor")
    )
    speeds, losses = [turn["learned"] for turn in turns], turns[0]["losses"]
    return [
        name,
        f"{statistics.median(speeds):,.0f}",
        f"{min(speeds):,.0f} to {max(speeds):,.0f}",
        f"{statistics.median(turn['tokens'] for turn in turns):,.0f}",
        f"{ratio:.2f}×",
        f"{target:g}×" if target else "",
        f"{by_processor:.2f}×",
        f"{statistics.median(turn['megabytes'] for turn in turns):,.0f}",
        f"{turns[0]['all_learned']:,}",
        f"{losses[min(losses)]:.4f}",
        f"{losses[max(losses)]:.4f}",
    ]


def overhead(folder: Path, shape: str, plan: BenchmarkPlan) -> str:
    """Our loop against a bare one."""
    turn = Turn(
        folder=str(folder),
        model=str(folder / shape),
        store=str(folder / "store"),
        tokenizer=str(folder / "tokenizer"),
        documents="",
        seq_len=plan.seq_len,
        steps=plan.overhead_steps,
        accumulation=plan.accumulation,
        world_size=RANKS,
        lr=1e-3,
        reduce_bucket_size=50_000_000,
    )
    (folder / "overhead.json").write_text(json.dumps(asdict(turn)), encoding="utf-8")
    ranks(folder, "train_overhead.py", str(folder / "overhead.json"))
    return (folder / f"overhead-{shape}.md").read_text(encoding="utf-8")


def main(data: Path, results: Path, plan: BenchmarkPlan) -> None:
    start, load_at_start, parts, rows = time.time(), timing.load(), [], []
    os.environ["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    os.environ |= {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    results.mkdir(parents=True, exist_ok=True)
    name = f"train_cpu{os.cpu_count()}_{date.today():%Y%m}"
    with tempfile.TemporaryDirectory() as temporary_folder:
        folder = Path(temporary_folder)
        make_store(folder, data)
        for shape in plan.shapes:
            parts.append(measure(folder, shape, plan, rows))
            parts.append(overhead(folder, shape, plan))
    trl = f"trl {importlib.metadata.version('trl')}" if find_spec("trl") else "trl not installed"
    libraries = describe("torch", "transformers", "accelerate", "deepspeed")
    description = f"{libraries}, {trl}; {RANKS} ranks, {load_at_start} at the start"
    head = (
        "# Training\n\n"
        f"{description}.\n\n"
        "float32, ZeRO-2, gloo, AdamW, one row (or as many padded documents) a micro-batch, rounds of turns: "
        f"{plan.rounds}; medians. Padding is no token. Peak memory: resident, of the larger rank, over the libraries' "
        "own. The ratio is that of learned tokens a second, round by round; by processor time, of learned tokens a "
        f"second of the processor. All turns: the CSV. Everything took {time.time() - start:,.0f} s.\n"
    )
    (results / f"{name}.md").write_text("\n".join([head, *parts]), encoding="utf-8")
    with (results / f"{name}.csv").open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(FIELDS.split())
        writer.writerows(rows)
    print((results / f"{name}.md").read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("results", type=Path, nargs="?", default=BENCHMARKS / "results")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contender, at least 3 for a result")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens in a packed row")
    parser.add_argument("--quick", action="store_true", help="one round of the tiny model: does everything run?")
    args = parser.parse_args()
    full_plan = BenchmarkPlan(("tiny", "small"), args.seq_len, 2, 2, 6, args.rounds, 30)
    quick_plan = BenchmarkPlan(("tiny",), 512, 2, 1, 3, 1, 6)
    main(args.data.resolve(), args.results.resolve(), quick_plan if args.quick else full_plan)
