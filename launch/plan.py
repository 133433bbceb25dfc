"""Say what a training run would train, without weights, network or GPU.

    python launch/plan.py experiment=firefly_llama2_7b_ext_cpt_qlora
    python launch/plan.py model=models/llama-2-7b-zh tuning=lora tuning.embeddings=new_rows optim.steps=1000 format=json

Takes what `launch/train.py` takes; `run` and `data` are not needed, nor is `model.path` where `conf/model` has the
architecture's numbers.
"""

import json
from dataclasses import asdict

from fireflyds import app
from fireflyds.config import PlanConfig, PlanFormat, Precision


def plan(config: PlanConfig) -> None:
    from fireflyds.engine import groups, optimizers
    from fireflyds.models import load, tuning

    # `auto` depends on the machine that trains, which this need not be.
    precision = Precision.bf16 if config.hardware.precision is Precision.auto else config.hardware.precision
    notes = optimizers.check(config, precision)
    hf_config = load.architecture_of(config.model)
    family = load.family_of(hf_config.model_type)
    new_rows_from = load.base_vocab_size(config.model, hf_config)
    model = tuning.apply(load.bare_model(hf_config), family, config.tuning, new_rows_from, config.seed)
    rows = groups.rows_of_table(model, config, precision)
    total, trainable = groups.count_parameters(model)
    if config.format is PlanFormat.json:
        print(
            json.dumps(
                {"parameters": total, "trainable_parameters": trainable, "groups": [asdict(row) for row in rows]}
            )
        )
        return
    print(f"{trainable:,} of {total:,} parameters train\n{groups.table(rows)}")
    if config.hardware.precision is Precision.auto:
        notes.append("note: hardware.precision=auto was counted as bf16, that of a GPU which has it")
    for note in notes:
        print(note)


if __name__ == "__main__":
    app.main(plan, __doc__)
