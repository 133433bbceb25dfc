"""Train a model on a token store: continued pre-training and instruction tuning, full-parameter, LoRA or QLoRA.

    deepspeed --num_gpus 2 launch/train.py experiment=demo_cpt
    torchrun --nproc_per_node 8 launch/train.py run=cpt model=models/llama-2-7b-zh data=stores/cpt optim.steps=1000
    python launch/train.py run=sft model=runs/cpt/export data=stores/sft tuning=qlora optim.epochs=2

The run lives in `runs/<run>`. The same command again resumes it from its newest checkpoint.
"""

import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from fireflyds import app
from fireflyds.config import TrainConfig
from fireflyds.errors import UserError
from fireflyds.types import StepMetrics

# A scheduler that sees this code may start the same command again.
EXIT_INTERRUPTED = 75


def train(config: TrainConfig) -> None:
    # Heavy imports wait until the configuration is good.
    import yaml

    from fireflyds.data.loader import PackedLoader
    from fireflyds.data.mix import RowSequence
    from fireflyds.engine import checkpoint, deepspeed, learnt, metrics, optimizers, ranks, run, trackers
    from fireflyds.engine.journal import Journal
    from fireflyds.engine.loop import train_steps
    from fireflyds.engine.measured import measured_by
    from fireflyds.engine.packed import packed_model
    from fireflyds.engine.signals import StopRequest
    from fireflyds.engine.validation import open_validator
    from fireflyds.models import load, tuning
    from fireflyds.models.fuse import chosen_attention, device_batch
    from fireflyds.models.positions import check_positions
    from fireflyds.tokenizer.encoder import load_encoder

    me = ranks.discover(os.environ)
    precision = deepspeed.resolve_precision(config.hardware)
    notes = optimizers.check(config, precision)
    trackers.check(config.tracking)
    accumulation = deepspeed.accumulation_steps(config, me.world_size)
    encoder = load_encoder(config.model.tokenizer_path)
    hf_config = load.read_config(config.model, encoder)
    check_positions(hf_config, "seq_len", config.seq_len)
    store = run.open_store(config, encoder.fingerprint())
    rows = RowSequence(store, config.seq_len, config.seed, config.data)
    total_steps, per_epoch = run.total_steps(config, rows), rows.rows_per_epoch / config.global_batch_size
    attention = chosen_attention(config.hardware, hf_config, precision)
    validator = open_validator(config, encoder, store, hf_config, total_steps, device_batch)

    deepspeed.start(me, config.hardware.timeout_minutes)
    text, run_dir = app.to_yaml(config), Path(config.run_dir)
    about = run.identity(config, encoder.fingerprint(), hf_config.vocab_size)
    lock = deepspeed.on_rank_zero(lambda: run.open_run(config, text, about | run.inputs(store)))
    deepspeed.on_rank_zero(lambda: learnt.take_over(config, about))
    log = metrics.logger(run_dir, me.rank)

    model = packed_model(config, hf_config, precision)
    about_run = run.describe(config, model, store, rows, total_steps, me.world_size, accumulation, precision)
    log.info("\n".join([about_run, *notes]))
    measured = measured_by(config, model, store, encoder, precision)
    engine = deepspeed.build_engine(model, config, precision, accumulation)
    state = checkpoint.load(engine, run_dir)
    if state.step:
        log.info(run.resumed(state, total_steps))
    loader = PackedLoader(store, rows, config.micro_batch_size, config.global_batch_size, me.rank, me.world_size)
    tracker = trackers.open_tracker(config, yaml.safe_load(text), me.rank, state.step, log)
    stop = partial(StopRequest().agreed, engine.device)
    keeper = learnt.Keeper(model, config, tuning.described(model), about)
    journal = Journal(run_dir, tracker, log, me.rank, state.step, total_steps, config.log_every, per_epoch)

    save = partial(checkpoint.save, engine, run_dir, state, config.checkpoint.keep, keeper)

    with attention, journal:
        validator.begin(engine, journal, state.step)
        steps = train_steps(engine, loader, state, config.optim, total_steps, config.seed, device_batch, measured)
        risen = _run(steps, config, total_steps, journal, save, partial(validator.after, engine, journal), stop)
    deepspeed.leave()
    if lock:
        lock.close()
    _say_how_it_ended(risen, whole=state.step == total_steps)


def _say_how_it_ended(risen: str | None, *, whole: bool) -> None:
    """By the exit code."""
    if risen:
        raise UserError(f"validation.stop=true: {risen}. A checkpoint was saved")
    if not whole:
        sys.exit(EXIT_INTERRUPTED)


def _run(
    steps: Iterator[StepMetrics],
    config: TrainConfig,
    total_steps: int,
    journal: Any,
    save: Callable[[], Any],
    validate: Callable[[int], str | None],
    stop: Callable[[], bool],
) -> str | None:
    """Every step, and what follows from it. Returns why the guard of a domain ended the run."""
    for step in steps:
        journal.record(step)
        stopping = stop() and step.step < total_steps
        due = step.step % config.checkpoint.every == 0 or step.step == total_steps
        if due or stopping:
            save()
        risen = None if stopping else validate(step.step)
        if risen and not due:
            save()
        if due or stopping or risen:
            journal.saved()
        if stopping:
            journal.log.info(f"stopped at step {step.step}, checkpoint saved; the same command goes on from here")
            break
        if risen:
            return risen
    return None


if __name__ == "__main__":
    app.main(train, __doc__)
