"""A turn of Hugging Face's Trainer in `bench_train.py`, under the same ZeRO-2.

    torchrun --nproc_per_node 2 benchmarks/train_hf.py turn.json padded|packed

`padded`: the documents of a step, shuffled, in as many padded batches as fireflyds has rows in it. `packed`: exactly
fireflyds' rows, flattened by `DataCollatorWithFlattening`, documents separated by `position_ids`.
"""

import sys
from typing import Any

from train_turn import IGNORE_INDEX, Documents, Record, Turn, deepspeed_settings, end_turn, prepare_rank

Features = list[dict[str, list[int]]]


def training_arguments(turn: Turn) -> dict[str, Any]:
    """What Trainer and SFTTrainer share. AdamW is the default one of each (fused)."""
    return {
        "output_dir": f"{turn.folder}/out",
        "use_cpu": True,
        "deepspeed": deepspeed_settings(turn),
        "max_steps": turn.steps,
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": turn.accumulation,
        "learning_rate": turn.lr,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "adam_beta1": 0.9,
        "adam_beta2": 0.95,
        "adam_epsilon": 1e-8,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        "dataloader_pin_memory": False,
        "seed": 42,
    }


def recording_trainer(trainer: type[Any], record: Record) -> type[Any]:
    """A subclass of the trainer that records the time of every step and the tokens of every micro-batch."""
    from transformers import TrainerCallback

    class StepTimer(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            record.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            record.step_done()

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **_: Any) -> None:
            if "loss" in logs:
                record.losses[state.global_step] = float(logs["loss"])

    class RecordingTrainer(trainer):  # type: ignore[misc, valid-type]
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, callbacks=[StepTimer()], **options)

        def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            mask = inputs.get("attention_mask")
            tokens = inputs["input_ids"].numel() if mask is None else int(mask.sum())
            record.add_micro_batch(tokens, int((inputs["labels"][:, 1:] != IGNORE_INDEX).sum()))
            return super().training_step(model, inputs, *arguments, **options)

    return RecordingTrainer


def batches(turn: Turn, documents: Documents, layout: str) -> list[Features]:
    """Micro-batches in the order in which ranks take them: the number within a step is micro * ranks + rank."""
    rows_per_step = turn.accumulation * turn.world_size
    if layout == "packed":
        return [documents.of_row(row) for row in range(turn.rows)]
    steps = ([*range(first, first + rows_per_step)] for first in range(0, turn.rows, rows_per_step))
    return [batch for number, rows in enumerate(steps) for batch in documents.padded_batches(rows, number)]


def padded(items: list[Features]) -> dict[str, Any]:
    """One micro-batch, padded to its longest document."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    features = items[0]

    def pad(name: str, value: int) -> Any:
        return pad_sequence(
            [torch.tensor(document[name]) for document in features], batch_first=True, padding_value=value
        )

    ones = [torch.ones(len(document["input_ids"]), dtype=torch.long) for document in features]
    mask = pad_sequence(ones, batch_first=True)
    return {"input_ids": pad("input_ids", 0), "labels": pad("labels", IGNORE_INDEX), "attention_mask": mask}


def main(turn: Turn, layout: str) -> None:
    prepare_rank()
    from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer, TrainingArguments
    from transformers.models.llama import modeling_llama  # noqa: F401

    record = Record()
    record.libraries_loaded()
    flatten = DataCollatorWithFlattening()
    arguments = TrainingArguments(
        **training_arguments(turn), train_sampling_strategy="sequential", remove_unused_columns=False
    )
    trainer = recording_trainer(Trainer, record)(
        model=AutoModelForCausalLM.from_pretrained(turn.model, attn_implementation="sdpa", dtype="float32"),
        args=arguments,
        train_dataset=batches(turn, Documents(turn.documents), layout),
        data_collator=padded if layout == "padded" else lambda items: flatten(items[0]),
    )
    trainer.train()
    record.write(turn)
    end_turn()


if __name__ == "__main__":
    main(Turn.read(sys.argv[1]), sys.argv[2])
