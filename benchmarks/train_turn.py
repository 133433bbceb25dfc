"""One turn of one contender of `bench_train.py`: what it trains on, and what every rank records.

A turn is a process per rank. It reads `turn.json`, trains `steps` optimizer steps, and leaves `rank<N>.json`: the
seconds of each step by the clock and of the processor (which others on the machine do not lengthen), the tokens and the
learned tokens this rank saw in it, the losses that were reported, and the most memory over the libraries' own.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import timing

IGNORE_INDEX = -100


@dataclass(frozen=True, slots=True)
class Turn:
    """What all contenders share. `accumulation` micro-batches of one row of `seq_len` tokens a rank and step."""

    folder: str
    model: str
    store: str
    tokenizer: str
    documents: str
    seq_len: int
    steps: int
    accumulation: int
    world_size: int
    lr: float
    reduce_bucket_size: int

    @classmethod
    def read(cls, path: str) -> "Turn":
        return cls(**json.loads(Path(path).read_text(encoding="utf-8")))

    @property
    def rows(self) -> int:
        """Of all steps."""
        return self.steps * self.accumulation * self.world_size


class Documents:
    """The documents of our rows, exported once: `ids`, `labels` int64 `[n]`, `bounds` int64 `[m + 1]`, `rows` int64
    `[m]`.

    `labels[t]` is token t where it is learned (transformers shifts them), -100 elsewhere and at every document's begin.
    """

    def __init__(self, path: str) -> None:
        arrays = np.load(path)
        self._ids, self._labels, self._bounds = arrays["ids"], arrays["labels"], arrays["bounds"]
        self.rows = arrays["rows"]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, list[int]]:
        first, end = self._bounds[number], self._bounds[number + 1]
        return {"input_ids": self._ids[first:end].tolist(), "labels": self._labels[first:end].tolist()}

    def of_row(self, row: int) -> list[dict[str, list[int]]]:
        """The documents of one packed row."""
        return [self[number] for number in np.flatnonzero(self.rows == row).tolist()]

    def padded_batches(self, rows: list[int], seed: int) -> list[list[dict[str, list[int]]]]:
        """The documents of some rows, shuffled and dealt out evenly to as many padded batches."""
        numbers = np.flatnonzero(np.isin(self.rows, rows))
        shuffled = np.random.default_rng(seed).permutation(numbers)
        return [[self[number] for number in part.tolist()] for part in np.array_split(shuffled, len(rows))]


@dataclass(slots=True)
class Record:
    """Filled while a contender trains, written when it is done."""

    seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    learned: list[int] = field(default_factory=list)
    losses: dict[int, float] = field(default_factory=dict)
    _peak: float = 0.0
    _libraries: float = 0.0
    _step_start: float = 0.0
    _processor_start: float = 0.0
    _tokens: int = 0
    _learned: int = 0

    def libraries_loaded(self) -> None:
        """Marks the memory of the libraries, which does not count."""
        status = Path("/proc/self/status").read_text()
        self._libraries = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS")) / 1024
        timing.reset_peak()

    def begin(self) -> None:
        """The first step begins."""
        self._step_start, self._processor_start = time.perf_counter(), time.process_time()

    def add_micro_batch(self, tokens: int, learned: int) -> None:
        """One micro-batch of this rank."""
        self._tokens += tokens
        self._learned += learned

    def step_done(self) -> None:
        now, processor_now = time.perf_counter(), time.process_time()
        # Saving after the last step does not count as training.
        self._peak = timing.peak_megabytes()
        self.seconds.append(now - self._step_start)
        self.processor_seconds.append(processor_now - self._processor_start)
        self.tokens.append(self._tokens)
        self.learned.append(self._learned)
        self._step_start, self._processor_start, self._tokens, self._learned = now, processor_now, 0, 0

    def write(self, turn: Turn) -> None:
        record = {
            "seconds": self.seconds,
            "processor_seconds": self.processor_seconds,
            "tokens": self.tokens,
            "learned": self.learned,
            "losses": self.losses,
            "own_megabytes": self._libraries,
            "megabytes": self._peak - self._libraries,
        }
        rank = os.environ["RANK"]
        Path(turn.folder, f"rank{rank}.json").write_text(json.dumps(record), encoding="utf-8")


def deepspeed_settings(turn: Turn) -> dict[str, Any]:
    """ZeRO-2 as ours is set up (`fireflyds/zero/engine.py`): the optimizer is the caller's own AdamW."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": turn.accumulation,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": 2, "reduce_bucket_size": turn.reduce_bucket_size, "overlap_comm": False},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 1 << 30,
    }


def prepare_rank() -> None:
    """The same start for all: DeepSpeed on the CPU, gloo for all collectives, an equal share of the cores."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    import torch

    # DeepSpeed would compile a shared-memory all-reduce for a minute at the first start; ours does without it too.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(os.environ["WORLD_SIZE"])))
    deepspeed.utils.logger.setLevel("WARNING")


def end_turn() -> NoReturn:
    """Ends this rank without finalisation of the interpreter, which gloo's threads may abort (SIGABRT)."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
