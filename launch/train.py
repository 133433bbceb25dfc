"""Train a model on a token store: continued pre-training and instruction tuning, full-parameter, LoRA or QLoRA.

    deepspeed --num_gpus 2 launch/train.py experiment=demo_cpt
    torchrun --nproc_per_node 8 launch/train.py run=cpt model=models/llama-2-7b-zh data=stores/cpt optim.steps=1000
    python launch/train.py run=sft model=runs/cpt/export data=stores/sft tuning=qlora optim.epochs=2

The run lives in `runs/<run>`. The same command again resumes it from its newest checkpoint.
"""

import os
import sys
from pathlib import Path

from fireflyds import app
from fireflyds.config import TrainConfig

# A scheduler that sees this code may start the same command again.
EXIT_INTERRUPTED = 75


def train(config: TrainConfig) -> None:
    # Heavy imports wait until the configuration is good.
    import yaml

    from fireflyds.data.loader import PackedLoader
    from fireflyds.data.mix import RowSequence
    from fireflyds.engine import checkpoint, deepspeed, learnt, measured, metrics, optimizers, ranks, run, trackers
    from fireflyds.engine.journal import Journal
    from fireflyds.engine.loop import train_steps
    from fireflyds.engine.packed import packed_model
    from fireflyds.engine.signals import StopRequest
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
    total_steps = run.total_steps(config, rows)
    attention = chosen_attention(config.hardware, hf_config, precision)

    deepspeed.start(me, config.hardware.timeout_minutes)
    text = app.to_yaml(config)
    run_dir = Path(config.run_dir)
    about = run.identity(config, encoder.fingerprint(), hf_config.vocab_size)
    lock = deepspeed.on_rank_zero(lambda: run.open_run(config, text, about | run.inputs(store)))
    deepspeed.on_rank_zero(lambda: learnt.take_over(config, about))
    log = metrics.logger(run_dir, me.rank)

    model = packed_model(config, hf_config, precision)
    about_run = run.describe(config, model, store, rows, total_steps, me.world_size, accumulation, precision)
    log.info("\n".join([about_run, *notes]))
    about_steps = measured.of_run(config, model, store, encoder, precision)
    engine = deepspeed.build_engine(model, config, precision, accumulation)
    state = checkpoint.load(engine, run_dir)
    if state.step:
        log.info(run.resumed(state, total_steps))
    loader = PackedLoader(store, rows, config.micro_batch_size, config.global_batch_size, me.rank, me.world_size)
    tracker = trackers.open_tracker(
        config.tracking, config.run, run_dir, yaml.safe_load(text), me.rank, state.step, log
    )
    steps_per_epoch = rows.rows_per_epoch / config.global_batch_size
    stop = StopRequest()
    keeper = learnt.Keeper(model, config, tuning.described(model), about)

    journal = Journal(run_dir, tracker, log, me.rank, state.step, total_steps, config.log_every, steps_per_epoch)

    with attention, journal:
        for step in train_steps(
            engine, loader, state, config.optim, total_steps, config.seed, device_batch, about_steps
        ):
            journal.record(step)
            stopping = stop.agreed(engine.device)
            if step.step % config.checkpoint.every == 0 or step.step == total_steps or stopping:
                checkpoint.save(engine, run_dir, state, config.checkpoint.keep, keeper)
                journal.saved()
            if stopping and step.step < total_steps:
                log.info(f"stopped at step {step.step}, checkpoint saved; the same command goes on from here")
                break
    deepspeed.leave()
    if lock:
        lock.close()
    if state.step < total_steps:
        sys.exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    app.main(train, __doc__)
