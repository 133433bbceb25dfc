"""A turn of TRL's SFTTrainer in `bench_train.py`, under the same ZeRO-2. Needs
`pip install -r benchmarks/requirements-train.txt`.

    torchrun --nproc_per_node 2 benchmarks/train_trl.py turn.json bfd|padded

`bfd`: TRL packs the documents itself; rows of `seq_len` tokens, no padding, documents separated by `position_ids`
(free of contamination under SDPA: transformers masks by them). `padded`: as many documents in a batch as make up a row
on average.
"""

import sys
from typing import Any

from train_hf import recording_trainer, training_arguments
from train_turn import Documents, Record, Turn, end_turn, prepare_rank


def main(turn: Turn, layout: str) -> None:
    prepare_rank()
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.models.llama import modeling_llama  # noqa: F401
    from trl import SFTConfig, SFTTrainer

    record = Record()
    record.libraries_loaded()
    documents = Documents(turn.documents)
    rows = [documents[number] for number in range(len(documents))]
    settings: dict[str, Any] = training_arguments(turn) | {"max_length": turn.seq_len, "dataset_num_proc": None}
    if layout == "bfd":
        settings |= {"packing": True, "packing_strategy": "bfd"}
    else:
        settings["per_device_train_batch_size"] = round(len(documents) / turn.rows)
        settings["deepspeed"]["train_micro_batch_size_per_gpu"] = settings["per_device_train_batch_size"]
    trainer = recording_trainer(SFTTrainer, record)(
        model=AutoModelForCausalLM.from_pretrained(turn.model, attn_implementation="sdpa", dtype=torch.float32),
        args=SFTConfig(**settings),
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(turn.tokenizer),
    )
    trainer.train()
    record.write(turn)
    end_turn()


if __name__ == "__main__":
    main(Turn.read(sys.argv[1]), sys.argv[2])
