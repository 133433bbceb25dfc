"""Train a model on a token store: continued pre-training and instruction tuning, full-parameter, LoRA or QLoRA.

    deepspeed --num_gpus 2 launch/train.py experiment=demo_cpt
    torchrun --nproc_per_node 8 launch/train.py run=cpt model=models/llama-2-7b-zh data=stores/cpt optim.steps=1000
    python launch/train.py run=sft model=runs/cpt/export data=stores/sft tuning=qlora optim.epochs=2

The run lives in `runs/<run>`. The same command again resumes it from its newest checkpoint, on any number of GPUs. To ask
a running one: `touch runs/<run>/SAVE` saves; Ctrl-C, SIGTERM or SIGUSR1 save and leave with exit code 75, on which a scheduler may
start it again; `touch runs/<run>/STOP` saves and leaves with 76.
"""

import os
from pathlib import Path

from fireflyds import app
from fireflyds.config import TrainConfig


def train(config: TrainConfig) -> None:
    # Heavy imports wait until the configuration is good.
    from fireflyds.data.loader import PackedLoader
    from fireflyds.data.mix import RowSequence
    from fireflyds.data.store import open_store
    from fireflyds.engine import checkpoint, deepspeed, learnt, local_cache, metrics, optimizers, ranks, run, trackers
    from fireflyds.engine.agreement import join
    from fireflyds.engine.course import Course
    from fireflyds.engine.heartbeat import Heartbeat
    from fireflyds.engine.journal import Journal
    from fireflyds.engine.measured import measured_by
    from fireflyds.engine.packed import packed_model
    from fireflyds.engine.planning import memory
    from fireflyds.engine.status import Status
    from fireflyds.engine.validation import open_validator
    from fireflyds.models import load, tuning
    from fireflyds.models.fuse import chosen_attention, device_batch
    from fireflyds.models.positions import check_positions
    from fireflyds.models.precision import emulation_notes, resolve_precision
    from fireflyds.tokenizer.encoder import load_encoder

    me = ranks.discover(os.environ)
    precision = resolve_precision(config.hardware)
    notes = [*optimizers.check(config, precision), *emulation_notes(precision)]
    trackers.check(config.tracking)
    accumulation = config.accumulation_steps(me.world_size)
    encoder = load_encoder(config.model.tokenizer_path)
    hf_config = load.read_config(config.model, encoder)
    check_positions(hf_config, "seq_len", config.seq_len)
    store = open_store("data.store", config.data.store, encoder.fingerprint(), config.model.tokenizer_path)
    rows = RowSequence(store, config.seq_len, config.seed, config.data)
    total_steps, per_epoch = run.total_steps(config, rows), rows.rows_per_epoch / config.global_batch_size
    attention = chosen_attention(config.hardware, hf_config, precision)
    validator = open_validator(config, encoder, store, hf_config, total_steps, device_batch)
    text, run_dir = app.to_yaml(config), Path(config.run_dir)
    reads = run.inputs(store) | {"tokenizer": encoder.fingerprint(), "total_steps": total_steps}
    notes += join(me, config, text, reads)
    about = run.identity(config, encoder.fingerprint(), hf_config.vocab_size)
    _held = deepspeed.on_rank_zero(lambda: run.open_run(config, text, about | run.inputs(store)))
    status = Status(run_dir, me.rank, total_steps)
    with status, Heartbeat(me, run_dir, config.recovery.heartbeat_seconds, status):
        deepspeed.on_rank_zero(lambda: learnt.take_over(config, about))
        log = metrics.logger(run_dir, me.rank)
        here, tokens = local_cache.bring(config, about["base"], store, log.info)
        before = memory.resident()
        model = packed_model(here, hf_config, precision)
        about_run = run.describe(config, model, store, rows, total_steps, me.world_size, accumulation, precision)
        planned = memory.line(model, config, precision, me.world_size, accumulation)
        log.info("\n".join([about_run, planned, *notes]))
        measured = measured_by(config, model, store, encoder, precision)
        engine = deepspeed.build_engine(model, config, precision, accumulation)
        keeper = learnt.Keeper(model, config, tuning.described(model), about)
        loader = PackedLoader(tokens, rows, config.micro_batch_size, config.global_batch_size, me.rank, me.world_size)
        with checkpoint.Saver(engine, run_dir, config.checkpoint, keeper) as saver:
            state = checkpoint.load(engine, run_dir, log.warning)
            log.info(run.begins(state, total_steps))
            tracker = trackers.open_tracker(config, app.plain(text), me.rank, state.step, log)
            journal = Journal(run_dir, tracker, log, me.rank, state.step, total_steps, config.log_every, per_epoch)
            with attention, journal:
                course = Course(config, engine, loader, measured, validator, saver, journal, status)
                exit_code = course.follow(state, total_steps)
                log.info(f"{planned}; {memory.measured(before)}")
    deepspeed.end(exit_code)


if __name__ == "__main__":
    app.main(train, __doc__)
