"""The overhead of the training loop over a bare one: on one DeepSpeed engine, with the same batches, in turns.

    torchrun --nproc_per_node 2 benchmarks/train_overhead.py turn.json        writes overhead-<model>.md beside it

Ours: `train_steps` with its loader's thread, the count of learned tokens over the ranks, the loss, the norm, the
logger with its files, and the poll for stop requests. Bare: forward, backward and step over prepared batches, scaled by
a precomputed number; nothing is read, counted or written.
"""

import logging
import random
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import timing
from train_ours import overrides
from train_turn import Turn, prepare_rank

WARMUP = 3


def build(turn: Turn) -> tuple[Any, Any, Any, Any]:
    """As `launch/train.py` does it: the configuration, the engine, the loader, and how a batch reaches the device."""
    import os

    from fireflyds import app
    from fireflyds.data.pack.loader import PackedLoader
    from fireflyds.data.pack.mixture import PackedRowSampler
    from fireflyds.data.store.store import open_store
    from fireflyds.distributed import launcher_env
    from fireflyds.metrics.accumulator import build_metrics_context
    from fireflyds.models import load
    from fireflyds.models.precision import resolve_precision
    from fireflyds.tokenizer.encoder import load_encoder
    from fireflyds.train.trainer import build_model
    from fireflyds.zero.engine import build_engine, init_distributed

    config = app.compose("train", overrides(turn))
    rank_info = launcher_env.rank_from_environment(os.environ)
    init_distributed(rank_info, config.hardware.timeout_minutes)
    precision = resolve_precision(config.hardware)
    encoder = load_encoder(config.model.tokenizer_path)
    model = build_model(config, load.read_config(config.model, encoder), precision)
    store = open_store("data.store", config.data.store, encoder.fingerprint(), config.model.tokenizer_path)
    metrics_context = build_metrics_context(config, model, store, encoder, precision)
    engine = build_engine(model, config, precision, turn.accumulation)
    rows = PackedRowSampler(store, config.seq_len, config.seed, config.data)
    loader = PackedLoader(
        store, rows, config.micro_batch_size, config.global_batch_size, rank_info.rank, rank_info.world_size
    )
    return config, engine, loader, metrics_context


def fireflyds_steps(turn: Turn, config: Any, engine: Any, loader: Any, metrics_context: Any) -> Iterator[None]:
    """The steps of a run, one per `next`."""
    import torch.distributed as dist

    from fireflyds.distributed.signals import StopSignals
    from fireflyds.metrics.logger import MetricsLogger
    from fireflyds.metrics.trackers import NoTracker
    from fireflyds.train.loop import train_steps
    from fireflyds.train.objectives import load_objective
    from fireflyds.types import TrainState

    folder = Path(turn.folder) / "overhead"
    folder.mkdir(exist_ok=True)
    requests, logger_of_overhead = StopSignals(folder), logging.getLogger("overhead")
    metrics_logger = MetricsLogger(
        folder, NoTracker(), logger_of_overhead, dist.get_rank(), 0, turn.steps, config.log_every, turn.steps
    )
    for metrics in train_steps(
        engine, load_objective(config.objective), loader, TrainState(), config, turn.steps, metrics_context
    ):
        metrics_logger.log_step(metrics)
        requests.poll(engine.device, failed=False)
        yield


def bare_steps(turn: Turn, engine: Any, loader: Any) -> Iterator[None]:
    import torch
    import torch.distributed as dist

    prepared_steps = []
    for number in range(turn.steps):
        batches = loader.step(number)
        learned = torch.tensor(float(sum(batch.num_learned for batch in batches)))
        dist.all_reduce(learned)
        scale = turn.world_size * len(batches) / float(learned)
        prepared_steps.append([(batch.model_inputs(engine.device), scale) for batch in batches])
    for batches in prepared_steps:
        for batch, scale in batches:
            engine.backward(engine(**batch) * scale)
            engine.step()
        yield


def main(turn: Turn) -> None:
    prepare_rank()
    config, engine, loader, metrics_context = build(turn)
    import torch.distributed as dist

    loops = {
        "bare": bare_steps(turn, engine, loader),
        "ours": fireflyds_steps(turn, config, engine, loader, metrics_context),
    }
    seconds: dict[str, list[float]] = {name: [] for name in loops}
    processor: dict[str, list[float]] = {name: [] for name in loops}
    generator = random.Random(0)
    for number in range(turn.steps):
        for name in generator.sample(list(loops), 2):
            dist.barrier()
            start, processor_start = time.perf_counter(), time.process_time()
            next(loops[name])
            if number >= WARMUP:
                seconds[name].append(time.perf_counter() - start)
                processor[name].append(time.process_time() - processor_start)
    if dist.get_rank() == 0:
        Path(turn.folder, f"overhead-{Path(turn.model).name}.md").write_text(
            report(turn, seconds, processor), encoding="utf-8"
        )
    dist.barrier()
    dist.destroy_process_group()


def report(turn: Turn, seconds: dict[str, list[float]], processor: dict[str, list[float]]) -> str:
    """Both by the clock and by rank 0's processor time, which others on the machine do not lengthen."""
    rows = [
        [
            name,
            *(
                f"{statistic(values) * 1e3:,.1f}"
                for values in (seconds[name], processor[name])
                for statistic in (min, statistics.median)
            ),
        ]
        for name in seconds
    ]
    clock_overhead, processor_overhead = (
        statistics.median(
            fireflyds_seconds / bare_seconds
            for fireflyds_seconds, bare_seconds in zip(times["ours"], times["bare"], strict=True)
        )
        - 1
        for times in (seconds, processor)
    )
    title = f"{Path(turn.model).name}: our loop over a bare loop on the same engine, {len(seconds['ours'])} steps each"
    columns = ["", "least ms", "median ms", "processor, least ms", "median ms"]
    summary = (
        f"Overhead, the median of the ratios of equal steps: {clock_overhead:+.1%} by the clock, "
        f"{processor_overhead:+.1%} by processor time; asked: at most 3 %.\n"
    )
    return timing.table(title, columns, rows) + "\n" + summary


if __name__ == "__main__":
    main(Turn.read(sys.argv[1]))
