"""Train a model on a token store: continued pre-training and instruction tuning, full-parameter, LoRA or QLoRA.

    deepspeed --num_gpus 2 launch/train.py experiment=demo_cpt
    torchrun --nproc_per_node 8 launch/train.py run=cpt model=models/llama-2-7b-zh data=stores/cpt optim.steps=1000
    python launch/train.py run=sft model=runs/cpt/export data=stores/sft tuning=qlora optim.epochs=2

The run lives in `runs/<run>`. The same command again resumes it from its newest checkpoint.
"""

import hashlib
import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import torch.distributed as dist
import yaml

from fireflyds import app
from fireflyds.config import TrainConfig, TuningMethod
from fireflyds.data.loader import PackedLoader
from fireflyds.data.mix import RowSequence, lost_to_length
from fireflyds.data.store import TokenStore
from fireflyds.engine import checkpoint, deepspeed, metrics, ranks, run, trackers
from fireflyds.engine.journal import Journal
from fireflyds.engine.loop import train_steps
from fireflyds.engine.signals import StopRequest
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
    load.check_positions(hf_config, config.seq_len)
    store = open_store(config, encoder.fingerprint())
    rows = RowSequence(store, config.seq_len, config.seed, config.data.weights)
    total_steps = config.optim.steps or math.ceil(config.optim.epochs * rows.rows_per_epoch / config.global_batch_size)

    deepspeed.start(me, config.hardware.timeout_minutes)
    text = app.to_yaml(config)
    run_dir = Path(config.run_dir)
    lock = deepspeed.on_rank_zero(lambda: run.open_run(config, text, yaml.safe_load(text), inputs(config, store)))
    log = metrics.logger(run_dir, me.rank)

    quantization = tuning.quantization(config.tuning, precision)
    loaded = load.load_model(config.model, hf_config, precision, config.seed, quantization)
    model = fuse(tuning.apply(loaded.model, loaded.family, config.tuning, config.seed))
    if config.hardware.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    log.info(describe(config, model, store, rows, total_steps, me.world_size, accumulation, precision.name))
    engine = deepspeed.build_engine(model, config, precision, accumulation)
    state = checkpoint.load(engine, run_dir)
    if state.step:
        rest = "" if state.step < total_steps else "; nothing left to do"
        log.info(f"resumed at step {state.step} of {total_steps} ({state.tokens:,} tokens){rest}")
    loader = PackedLoader(store, rows, config.micro_batch_size, config.global_batch_size, me.rank, me.world_size)
    tracker = trackers.open_tracker(config.tracking, config.run, run_dir, yaml.safe_load(text), me.rank)
    stop = StopRequest()
    adapters_only = config.tuning.method is not TuningMethod.full

    with Journal(run_dir, tracker, log, me.rank, state.step, total_steps, config.log_every) as journal:
        for step in train_steps(engine, loader, state, config.optim, total_steps, config.seed, device_batch):
            journal.record(step)
            stopping = stop.agreed(engine.device)
            if step.step % config.checkpoint.every == 0 or step.step == total_steps or stopping:
                checkpoint.save(engine, run_dir, state, adapters_only=adapters_only, keep=config.checkpoint.keep)
            if stopping and step.step < total_steps:
                log.info(f"stopped at step {step.step}, checkpoint saved; the same command goes on from here")
                break
    dist.barrier()
    dist.destroy_process_group()
    if lock:
        lock.close()
    if state.step < total_steps:
        sys.exit(EXIT_INTERRUPTED)


def inputs(config: TrainConfig, store: TokenStore) -> dict[str, Any]:
    """What the run reads, by contents."""
    made_from = json.dumps(store.manifest["made_from"], sort_keys=True)
    base = run.contents_of(Path(config.model.path)) if config.model.path else None
    return {
        "store": hashlib.sha256(made_from.encode()).hexdigest(),
        "base": base,
        "template": store.manifest["template"],
    }


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


if __name__ == "__main__":
    app.main(train, __doc__)
