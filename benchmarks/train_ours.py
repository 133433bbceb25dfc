"""A turn of fireflyds in `bench_train.py`: `launch/train.py` unchanged, with a timer where the logger records a step.

torchrun --nproc_per_node 2 benchmarks/train_ours.py turn.json
"""

import atexit
import sys
from pathlib import Path

from train_turn import Record, Turn, prepare_rank

sys.path.insert(0, str(Path(__file__).parents[1] / "launch"))


def main(turn: Turn) -> None:
    prepare_rank()
    # All that the verb would import late, so that it does not count as memory of training.
    import peft  # noqa: F401
    import train
    from transformers.models.llama import modeling_llama  # noqa: F401

    from fireflyds import app
    from fireflyds.data.pack import loader
    from fireflyds.metrics import logger
    from fireflyds.models import load  # noqa: F401
    from fireflyds.tokenizer import encoder  # noqa: F401
    from fireflyds.train import trainer
    from fireflyds.types import PackedBatch, StepMetrics

    record = Record()
    record.libraries_loaded()
    original_step, original_log_step = loader.PackedLoader.step, logger.MetricsLogger.log_step
    batches_by_step: dict[int, list[PackedBatch]] = {}

    def step(self: loader.PackedLoader, number: int) -> list[PackedBatch]:
        batches_by_step[number] = original_step(self, number)
        return batches_by_step[number]

    def train_steps(*arguments: object) -> object:
        record.begin()
        yield from original_train_steps(*arguments)

    def log_step(self: logger.MetricsLogger, metrics: StepMetrics) -> None:
        original_log_step(self, metrics)
        for batch in batches_by_step.pop(metrics.step - 1):
            record.add_micro_batch(batch.input_ids.numel(), batch.num_learned)
        record.losses[metrics.step] = metrics.loss
        record.step_done()

    original_train_steps = trainer.train_steps
    trainer.train_steps = train_steps
    loader.PackedLoader.step, logger.MetricsLogger.log_step = step, log_step
    sys.argv = [train.__file__, *overrides(turn)]
    # The verb ends the process itself.
    atexit.register(record.write, turn)
    app.main(train.train, train.__doc__)


def overrides(turn: Turn) -> list[str]:
    """The overrides of `launch/train.py`."""
    return [
        "run=turn",
        f"runs={turn.folder}/runs",
        f"model={turn.model}",
        f"model.tokenizer={turn.tokenizer}",
        f"data={turn.store}",
        "tuning=full",
        "hardware=cpu",
        f"zero.reduce_bucket_size={turn.reduce_bucket_size}",
        f"seq_len={turn.seq_len}",
        f"global_batch_size={turn.accumulation * turn.world_size}",
        f"optim.steps={turn.steps}",
        f"optim.lr={turn.lr}",
        "optim.schedule=constant",
        "optim.warmup_ratio=0",
    ]


if __name__ == "__main__":
    main(Turn.read(sys.argv[1]))
