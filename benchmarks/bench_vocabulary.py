"""Speed and memory of learning pieces, and the duration of a merge with all its checks.

    python benchmarks/bench_vocabulary.py zh.txt llama2.model chinese_llama2.model out.md [megabytes]

The text is stretched to `megabytes` (100) by a chain of three characters, so that its words repeat as a corpus's do
and its lines do not. The baseline is what people run today: SentencePiece's trainer on the text as it is.
"""

import random
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from machine import describe

PIECES = 12_000


def stretch(source: Path, out: Path, size: int) -> None:
    """Write `size` bytes of text from a Markov chain of three characters over `source`."""
    generator, text = random.Random(1), source.read_text(encoding="utf-8")
    following: dict[str, list[str]] = defaultdict(list)
    for index in range(len(text) - 3):
        following[text[index : index + 3]].append(text[index + 3])
    state, written = text[:3], 0
    with out.open("w", encoding="utf-8") as file:
        while written < size:
            characters = []
            for _ in range(100_000):
                candidates = following.get(state)
                if not candidates:
                    index = generator.randrange(len(text) - 3)
                    state = text[index : index + 3]
                    continue
                character = generator.choice(candidates)
                characters.append(character)
                state = state[1:] + character
            chunk = "".join(characters)
            file.write(chunk)
            written += len(chunk.encode())


def learn_with_fireflyds(corpus: str, base: str, sample_characters: str) -> None:
    from fireflyds.config import ExpandConfig
    from fireflyds.data.read.sources import read_texts
    from fireflyds.tokenizer.base import load_base
    from fireflyds.tokenizer.expansion import plan_expansion
    from fireflyds.tokenizer.sample import draw_sample
    from fireflyds.tokenizer.scripts import Scripts

    config = ExpandConfig(
        base=base, corpus=corpus, out="-", num_pieces=PIECES, sample_characters=int(sample_characters)
    )
    sample = draw_sample(read_texts(corpus), characters=config.sample_characters, seed=config.seed)
    plan_expansion(config, load_base(Path(base)), Scripts(config.scripts), [], sample)
    print(f"{sample.characters:,} of {sample.characters_read:,} characters sampled")


def learn_with_sentencepiece(corpus: str) -> None:
    import sentencepiece

    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            input=corpus,
            model_prefix=f"{folder}/pieces",
            vocab_size=PIECES,
            model_type="bpe",
            character_coverage=0.9995,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )


def merge_and_check(pieces: str, base: str) -> None:
    from fireflyds.tokenizer.base import load_base
    from fireflyds.tokenizer.pieces import read_pieces
    from fireflyds.tokenizer.scripts import Scripts
    from fireflyds.tokenizer.vocabulary_merge import drop_unreachable, plan_merge, unreachable

    base_tokenizer = load_base(Path(base))
    plan = plan_merge(base_tokenizer, read_pieces(Path(pieces)), Scripts(["Han", "CJK_Punctuation"]))
    drop_unreachable(base_tokenizer, plan)
    with tempfile.TemporaryDirectory() as folder:
        base_tokenizer.write(plan.steps, Path(folder))
    print(
        f"{len(plan.steps):,} rows, {len(unreachable(base_tokenizer, plan, base_tokenizer.encoder(plan.steps)))} dead"
    )


STEPS = {step.__name__: step for step in (learn_with_fireflyds, learn_with_sentencepiece, merge_and_check)}


def measured(step: str, *arguments: str) -> tuple[float, float, str]:
    """Seconds, peak MiB and last line of one step in a process of its own."""
    start = time.perf_counter()
    code = (
        f"import sys, resource; sys.path.insert(0, {str(Path(__file__).parent)!r}); import bench_vocabulary as b; "
        f"b.STEPS[{step!r}](*{arguments!r}); print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024)"
    )
    completed = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    *output, peak = completed.stdout.strip().splitlines()
    return time.perf_counter() - start, float(peak), output[-1] if output else ""


def main() -> None:
    source, base, pieces, out = sys.argv[1:5]
    size = int(sys.argv[5] if len(sys.argv) > 5 else 100) * 1_000_000
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus.txt"
        stretch(Path(source), corpus, size)
        megabytes = corpus.stat().st_size / 1e6
        rows = []
        for name, step, *arguments in (
            ("learnt here, default sample", "learn_with_fireflyds", base, "10000000"),
            ("learnt here, sample as large as the text", "learn_with_fireflyds", base, "100000000"),
            ("SentencePiece's trainer alone", "learn_with_sentencepiece"),
        ):
            seconds, peak, note = measured(step, str(corpus), *arguments)
            rows.append(f"| {name} | {seconds:.1f} | {megabytes / seconds:.1f} | {peak:,.0f} | {note} |")
        seconds, peak, note = measured("merge_and_check", pieces, base)
    lines = [
        "# Vocabulary: learning and merging",
        "",
        describe("sentencepiece", "tokenizers"),
        "",
        f"{PIECES:,} pieces from {megabytes:.0f} MB of text, from start to end of a process. Learning here includes "
        "reading, sampling, the merge, what every piece saves, and the curve of sizes; the trainer alone gives a "
        "piece list.",
        "",
        "| | seconds | MB/s | peak MiB | |",
        "|---|---:|---:|---:|---|",
        *rows,
        "",
        f"Merging `{Path(pieces).name}` into `{Path(base).name}`, checking that every piece is reached, writing the "
        f"tokenizer: {seconds:.1f} s, {peak:,.0f} MiB ({note}).",
    ]
    Path(out).write_text("\n".join(lines) + "\n", encoding="utf-8")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
