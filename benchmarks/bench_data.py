"""Preparing, packing and loading, each compared with a common alternative, in one run.

    python benchmarks/bench_data.py zh.txt chinese_llama2.model out.md

`trl` is needed for the packing row (`pip install --no-deps trl`); nothing else of it is used.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median

import numpy as np
import psutil
from machine import describe

from fireflyds.config import DataConfig, PrepareConfig, SourceConfig
from fireflyds.data.clean.duplicates import banded, near_duplicates, signature
from fireflyds.data.pack.loader import PackedLoader
from fireflyds.data.pack.mixture import PackedRowSampler
from fireflyds.data.pack.packing import plan_rows
from fireflyds.data.store.build import finish_store, make_parts, store_provenance
from fireflyds.data.store.parts import plan_tasks
from fireflyds.data.store.store import VERSION, TokenStore
from fireflyds.tokenizer.encoder import load_encoder

ROOT = Path(__file__).parents[1]
SEQ_LEN = 4096
ROUNDS = 5


def repeated(source: Path, out: Path, size: int) -> None:
    """Write `size` bytes of the source's documents, in a new order each time."""
    documents = [line for line in source.read_text(encoding="utf-8").splitlines() if line.strip()]
    generator, num_bytes = random.Random(1), 0
    with out.open("w", encoding="utf-8") as file:
        while num_bytes < size:
            generator.shuffle(documents)
            num_bytes += sum(len(line.encode()) for line in documents)
            file.write("\n".join(documents) + "\n")


def timed(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def prepare_with_fireflyds(text: Path, model: Path, out: Path) -> None:
    config = PrepareConfig(
        data=DataConfig(sources=[SourceConfig(path=str(text))]), tokenizer=str(model), out=str(out), workers=2
    )
    encoder = load_encoder(model)
    tasks = plan_tasks(config, encoder.fingerprint())
    made_from = store_provenance(config, encoder, tasks)
    infos = make_parts(config, tasks, partial(load_encoder, model), out / "parts", out / "none", made_from)
    finish_store(config, tasks, infos, encoder, out, made_from)


def encode_with_sentencepiece(documents: list[str], model: Path) -> None:
    import sentencepiece

    sentencepiece.SentencePieceProcessor(model_file=str(model)).encode(documents, num_threads=2)


def map_with_datasets(text: Path, tokenizer: Path, cache: Path) -> None:
    import datasets
    from transformers import AutoTokenizer

    fast_tokenizer = AutoTokenizer.from_pretrained(tokenizer)
    rows = datasets.load_dataset("text", data_files=str(text), cache_dir=str(cache))["train"]
    rows.map(
        lambda batch: {"input_ids": fast_tokenizer(batch["text"])["input_ids"]},
        batched=True,
        num_proc=2,
        remove_columns="text",
    )


def encoding_rows(source: Path, model: Path, folder: Path) -> list[str]:
    text = folder / "text.txt"
    repeated(source, text, 100_000_000)
    megabytes = text.stat().st_size / 1e6
    documents = text.read_text(encoding="utf-8").splitlines()
    subprocess.run(
        [
            sys.executable,
            str(ROOT / "launch" / "expand.py"),
            f"base={model}",
            f"pieces={_one_piece(folder)}",
            f"out={folder}/fast",
            "vocab_multiple=1",
        ],
        check=True,
        capture_output=True,
    )
    work: dict[str, Callable[[int], object]] = {
        "text → store, 2 processes": lambda number: prepare_with_fireflyds(text, model, folder / f"store{number}"),
        "SentencePiece encoding alone, 2 threads (baseline)": lambda _: encode_with_sentencepiece(documents, model),
        "`datasets.map`, fast tokenizer, `num_proc=2` (baseline)": lambda number: map_with_datasets(
            text, folder / "fast", folder / f"cache{number}"
        ),
    }
    seconds: dict[str, list[float]] = {name: [] for name in work}
    for number in range(ROUNDS):
        for name, run in work.items():
            seconds[name].append(timed(partial(run, number)))
    return [
        f"| {name}, median of {ROUNDS} | {megabytes / median(times):.1f} MB/s | "
        f"{median(times):.1f} s for {megabytes:.0f} MB |"
        for name, times in seconds.items()
    ]


def _one_piece(folder: Path) -> Path:
    """A list of one piece, so that the tokenizer gets its `tokenizer.json`."""
    file = folder / "piece.txt"
    file.write_text("龘\n", encoding="utf-8")
    return file


def packing_rows() -> list[str]:
    lengths = np.minimum(np.exp(np.random.default_rng(0).normal(6, 1, 10_000_000)).astype(np.int64) + 1, SEQ_LEN)
    start = time.perf_counter()
    planned_rows = plan_rows(lengths, SEQ_LEN, 0, 1)
    seconds = time.perf_counter() - start
    fill = lengths.sum() / (len(planned_rows) * SEQ_LEN)
    rows = [
        (
            f"| packing 10 M lengths, {fill:.4%} full | {len(lengths) / seconds / 1e6:.2f} M documents/s | "
            f"{seconds:.1f} s |"
        )
    ]
    try:
        from trl import pack_dataset
    except ImportError:
        return rows
    import datasets

    sample_lengths = lengths[:200_000]
    dataset = datasets.Dataset.from_dict({"input_ids": [[0] * int(length) for length in sample_lengths]})
    start = time.perf_counter()
    packed = pack_dataset(dataset, seq_length=SEQ_LEN, strategy="bfd")
    seconds = time.perf_counter() - start
    fill = sample_lengths.sum() / (len(packed) * SEQ_LEN)
    return [
        *rows,
        (
            f'| `trl.pack_dataset(strategy="bfd")` on 200,000 of them, {fill:.4%} full (baseline; it moves the '
            f"tokens too) | {len(sample_lengths) / seconds / 1e6:.3f} M documents/s | {seconds:.1f} s |"
        ),
    ]


def loader_rows(store: TokenStore) -> list[str]:
    rows = PackedRowSampler(store, SEQ_LEN, 0, DataConfig())
    loader = PackedLoader(store, rows, 4, 4, 0, 1)
    for number in range(50):
        loader.step(number)
    steps, tokens = 2000, 0
    start = time.perf_counter()
    for number in range(steps):
        tokens += sum(batch.input_ids.numel() for batch in loader.step(number))
    seconds = time.perf_counter() - start
    return [
        (
            f"| loader, batches of {tokens / steps / 1000:.1f} k tokens, warm, one thread | "
            f"{tokens / seconds / 1e6:.1f} M tokens/s | {seconds / steps * 1e3:.2f} ms a batch |"
        )
    ]


def resume_rows(folder: Path) -> list[str]:
    """A store of 10 M documents; its ids are a file of zeros, its index is real."""
    count = 10_000_000
    lengths = np.minimum(np.exp(np.random.default_rng(1).normal(4, 1, count)).astype(np.int32) + 2, 4096)
    (folder / "parts").mkdir(parents=True)
    (folder / "index").mkdir()
    total = int(lengths.sum(dtype=np.int64))
    with (folder / "parts" / "a.ids").open("wb") as file:
        file.truncate(2 * total)
    columns = {
        "part": np.zeros(count, np.int32),
        "start": np.cumsum(lengths, dtype=np.int64) - lengths,
        "length": lengths,
        "domain": np.zeros(count, np.uint16),
        "language": np.zeros(count, np.uint16),
        "num_bytes": lengths.astype(np.int64),
        "rejected_start": np.zeros(len(lengths), np.int32),
        "label": np.full(len(lengths), -1, np.int8),
        "span_offsets": np.zeros(count + 1, np.int64),
        "spans": np.zeros((0, 2), np.int32),
        "prompt_heads": np.zeros(0, np.int32),
        "prompt_tails": np.zeros(0, np.int32),
        "prompt_offsets": np.zeros(1, np.int64),
        "prompts": np.zeros(0, np.uint16),
        "sentence_ends": np.zeros(0, np.int64),
    }
    for name, column in columns.items():
        np.save(folder / "index" / f"{name}.npy", column)
    manifest = {
        "version": VERSION,
        "dtype": "uint16",
        "domains": ["text"],
        "languages": [""],
        "template": None,
        "weights": {},
        "made_from": {"tokenizer": "x"},
        "parts": [{"key": "a", "tokens": total}],
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))

    def resume() -> None:
        store = TokenStore(folder)
        PackedLoader(store, PackedRowSampler(store, SEQ_LEN, 0, DataConfig()), 4, 4, 0, 1).step(1_000_000)

    first_seconds, cached_seconds = timed(resume), timed(resume)
    return [
        f"| first batch of step 1,000,000 of a store of 10 M documents, plans not yet made | {first_seconds:.2f} s | |",
        f"| ... plans beside the store, as after a kill | {cached_seconds:.2f} s | |",
    ]


def near_duplicate_rows(source: Path) -> list[str]:
    """Copies with changed characters among documents of the source; similarity is counted, not assumed."""
    rng = np.random.default_rng(0)
    characters = sorted({c for c in source.read_text(encoding="utf-8") if c > "\u4e00"})
    documents = list({line for line in source.read_text(encoding="utf-8").splitlines() if len(line) > 50})
    near_copies = []
    for text in documents[:1000]:
        changed = list(text)
        for index in rng.choice(len(text), max(1, len(text) // 60), replace=False):
            changed[index] = characters[int(rng.integers(len(characters)))]
        near_copies.append("".join(changed))
    pairs = [_similarity(a, b) for a, b in zip(documents, near_copies, strict=False)]
    start = time.perf_counter()
    signatures = np.array([signature(text) for text in documents + near_copies], np.uint32)
    drop = near_duplicates(banded([signatures], len(signatures)), 0.8)
    seconds = time.perf_counter() - start
    expected = np.array(pairs) >= 0.8
    recall = drop[len(documents) :][expected].mean()
    # An original that was dropped although it resembles no earlier one is a false positive.
    num_false = 0
    for index in np.flatnonzero(drop[: len(documents)]).tolist():
        num_false += max(_similarity(documents[index], other) for other in documents[:index]) < 0.75
    size = sum(map(len, documents + near_copies)) * 3 / 1e6
    return [
        (
            f"| near-duplicates: recall of {int(expected.sum())} planted at Jaccard ≥ 0.8 | {recall:.1%} | false "
            f"among {len(documents):,}: {num_false / len(documents):.2%}; {size / seconds:.1f} MB/s |"
        )
    ]


def _similarity(a: str, b: str) -> float:
    first, second = ({text[index : index + 5] for index in range(max(1, len(text) - 4))} for text in (a, b))
    return len(first & second) / len(first | second)


def memory_rows(source: Path, model: Path, folder: Path) -> list[str]:
    """Peak memory of `prepare` and its processes, shared pages counted once."""
    rows = []
    for name, size in (("100 MB", 100_000_000), ("1 GB", 1_000_000_000)):
        text = folder / "big.txt"
        repeated(source, text, size)
        shutil.rmtree(folder / "big", ignore_errors=True)
        command = [
            sys.executable,
            str(ROOT / "launch" / "prepare.py"),
            f"data={text}",
            f"tokenizer={model}",
            f"out={folder}/big",
        ]
        start = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        peak = _watch(process)
        seconds = time.perf_counter() - start
        rows.append(
            f"| `prepare` of {name}, whole process | {peak / 2**20:,.0f} MiB at most | "
            f"{text.stat().st_size / seconds / 1e6:.1f} MB/s |"
        )
    return rows


def _watch(process: subprocess.Popen[bytes]) -> int:
    peak, finished = 0, threading.Event()

    def sample_memory() -> None:
        nonlocal peak
        parent = psutil.Process(process.pid)
        while not finished.wait(0.1):
            try:
                peak = max(peak, sum(p.memory_full_info().pss for p in [parent, *parent.children(recursive=True)]))
            except psutil.Error:
                continue

    watcher = threading.Thread(target=sample_memory)
    watcher.start()
    process.wait()
    finished.set()
    watcher.join()
    assert process.returncode == 0
    return peak


def main() -> None:
    source, model, out = (Path(argument).resolve() for argument in sys.argv[1:4])
    with tempfile.TemporaryDirectory() as temporary_folder:
        folder = Path(temporary_folder)
        rows = encoding_rows(source, model, folder)
        rows += packing_rows()
        rows += loader_rows(TokenStore(folder / "store0"))
        rows += resume_rows(folder / "resume")
        rows += near_duplicate_rows(source)
        rows += memory_rows(source, model, folder)
    lines = [
        "# Data: preparing, packing, loading",
        "",
        describe("sentencepiece", "tokenizers", "datasets", "numpy", "rensa"),
        "",
        f"Text: `{source.name}`, its documents repeated in new orders. Rows of {SEQ_LEN:,} tokens.",
        "",
        "| what | | |",
        "|---|---:|---|",
        *rows,
    ]
    out.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
