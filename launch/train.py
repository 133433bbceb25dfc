"""Train a model on a token store: continued pre-training and instruction tuning, full-parameter, LoRA or QLoRA.

    deepspeed --num_gpus 2 launch/train.py experiment=demo_cpt
    torchrun --nproc_per_node 8 launch/train.py run=cpt model=models/llama-2-7b-zh data=stores/cpt optim.steps=1000
    python launch/train.py run=sft model=runs/cpt/export data=stores/sft tuning=qlora optim.epochs=2

The run lives in `runs/<run>`. The same command again resumes it from its newest checkpoint.
"""

import math
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import yaml

from fireflyds import app
from fireflyds.config import TrainConfig, TuningMethod
from fireflyds.data.loader import PackedLoader
from fireflyds.data.mix import RowSequence, lost_to_length
from fireflyds.data.store import TokenStore
from fireflyds.engine import checkpoint, deepspeed, metrics, ranks, run, trackers
from fireflyds.engine.loop import train_steps
from fireflyds.engine.progress import progress
from fireflyds.errors import UserError
from fireflyds.models import load, tuning
from fireflyds.models.fuse import device_batch, fuse
from fireflyds.tokenizer.encoder import load_encoder

# A scheduler that sees this code may start the same command again.
EXIT_INTERRUPTED = 75


def train(config: TrainConfig) -> None:
    me = ranks.discover(os.environ)
    precision = deepspeed.resolve_precision(config.hardware)
    accumulation = deepspeed.accumulation_steps(config, me.world_size)
    encoder = load_encoder(config.model.tokenizer_path)
    hf_config = load.read_config(config.model, encoder)
    store = open_store(config, encoder.fingerprint())
    rows = RowSequence(store, config.seq_len, config.seed, config.data.weights)
    total_steps = config.optim.steps or math.ceil(config.optim.epochs * rows.rows_per_epoch / config.global_batch_size)

    deepspeed.start(me, config.hardware.timeout_minutes)
    text = app.to_yaml(config)
    if me.rank == 0:
        run.open_run(config, text, yaml.safe_load(text))
    dist.barrier()
    run_dir = Path(config.run_dir)
    log = metrics.logger(run_dir, me.rank)

    loaded = load.load_model(
        config.model, hf_config, precision, config.seed, tuning.quantization(config.tuning, precision)
    )
    model = fuse(tuning.apply(loaded.model, loaded.family, config.tuning, config.seed))
    if config.hardware.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    log.info(describe(config, model, store, rows, total_steps, me.world_size, accumulation, precision.name))
    # Dropout differs between ranks; the weights above are drawn from the same seed on all of them.
    torch.manual_seed(config.seed + me.rank)

    engine = deepspeed.build_engine(model, config, precision, accumulation)
    state = checkpoint.load(engine, run_dir)
    if state.step:
        rest = "" if state.step < total_steps else "; nothing left to do"
        log.info(f"resumed at step {state.step} of {total_steps} ({state.tokens:,} tokens){rest}")
    loader = PackedLoader(store, rows, config.micro_batch_size, config.global_batch_size, me.rank, me.world_size)
    tracker = trackers.open_tracker(config.tracking, config.run, run_dir, yaml.safe_load(text), me.rank)
    lines = metrics.MetricsFile(run_dir, state.step) if me.rank == 0 else None
    stop = StopRequest()
    adapters_only = config.tuning.method is not TuningMethod.full

    with progress(total_steps, state.step, me.rank == 0) as advance:
        for step in train_steps(engine, loader, state, config.optim, total_steps, device_batch):
            tracker.log(step)
            advance(step)
            if lines:
                lines.write(step)
            if step.step % config.log_every == 0 or step.step == total_steps:
                log.info(metrics.line(step, total_steps))
            stopping = stop.agreed(engine.device)
            if step.step % config.checkpoint.every == 0 or step.step == total_steps or stopping:
                checkpoint.save(engine, run_dir, state, adapters_only=adapters_only, keep=config.checkpoint.keep)
            if stopping and step.step < total_steps:
                log.info(f"stopped at step {step.step}, checkpoint saved; the same command goes on from here")
                break
    if lines:
        lines.close()
        metrics.plot_loss({config.run: list(metrics.read_metrics(run_dir / "metrics.jsonl"))}, run_dir / "loss.png")
    tracker.finish()
    dist.barrier()
    dist.destroy_process_group()
    if state.step < total_steps:
        sys.exit(EXIT_INTERRUPTED)


def open_store(config: TrainConfig, fingerprint: str) -> TokenStore:
    """The token store, refused when it was made with another tokenizer."""
    if not config.data.store:
        raise UserError("data.store is empty: give data=<store made by launch/prepare.py>")
    store = TokenStore(config.data.store)
    made_with = store.manifest["made_from"]["tokenizer"]
    if made_with != fingerprint:
        raise UserError(
            f"data.store={config.data.store}: made with another tokenizer (hash {made_with[:12]}) than {config.model.tokenizer_path} "
            f"(hash {fingerprint[:12]}). Prepare it again with tokenizer={config.model.tokenizer_path}"
        )
    return store


def describe(
    config: TrainConfig,
    model: Any,
    store: TokenStore,
    rows: RowSequence,
    steps: int,
    world: int,
    accumulation: int,
    precision: str,
) -> str:
    """What is about to happen, in two lines."""
    total, trainable = tuning.count_parameters(model)
    truncated, dropped = lost_to_length(rows.pieces)
    lost = (
        f", {truncated} dialogues shortened and {dropped} left out for seq_len={config.seq_len}"
        if truncated or dropped
        else ""
    )
    return (
        f"{config.run}: {config.tuning.method.name}, {trainable:,} of {total:,} parameters train, ZeRO-{config.zero.stage}, {precision}\n"
        f"{len(store):,} documents, {int(store.offsets[-1]):,} tokens, {rows.rows_per_epoch:,} rows an epoch{lost}; {steps:,} steps of "
        f"{config.global_batch_size} rows = {world} ranks x {config.micro_batch_size} x {accumulation} accumulated"
    )


class StopRequest:
    """SIGTERM or Ctrl-C: the step is finished and saved. The second one leaves at once."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    def agreed(self, device: torch.device) -> bool:
        """Whether any rank was asked: all ranks hear the same answer."""
        asked = torch.tensor(int(self._asked), device=device)
        dist.all_reduce(asked)
        return bool(asked)


if __name__ == "__main__":
    app.main(train, __doc__)
