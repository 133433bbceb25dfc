r"""Estimate trainable parameters, memory and duration of a training run on given GPUs, without weights, network or GPU.

    python launch/plan.py experiment=firefly_llama2_7b_ext_cpt_qlora cluster=v100x4
    python launch/plan.py experiment=firefly_llama2_7b_ext_cpt_qlora cluster=a100x8 tuning=full optim=adamw \
      data=stores/cpt
    python launch/plan.py model=models/llama-2-7b-zh tuning=lora tuning.embeddings=new_rows optim.steps=1000 format=json

Takes the keys of `launch/train.py`, and `cluster`; `run` and `data` are optional, and so is `model.path` if
`conf/model` has the architecture. ZeRO stage, offloading, micro-batch size and activation checkpointing are varied.
"""

import json
from dataclasses import asdict
from pathlib import Path

from fireflyds import app
from fireflyds.config import ModelConfig, ModelInit, PlanConfig, PlanFormat
from fireflyds.optim.compatibility import check_compatibility


def plan(config: PlanConfig) -> None:
    """Prints the parameter groups, and the memory and duration of the planned configurations.

    Raises:
        UserError: the configuration is contradictory, or a value of the cluster is missing.
    """
    from fireflyds.metrics.flops import step_flops
    from fireflyds.models import load, tuning
    from fireflyds.optim import param_groups
    from fireflyds.planner import plan_report
    from fireflyds.planner.model_shape import model_shape
    from fireflyds.planner.plan import cluster_precision, make_plan, summarize_data
    from fireflyds.tokenizer.encoder import load_encoder
    from fireflyds.zero.import_json import extra_settings

    config.cluster.require_machine()
    precision = cluster_precision(config)
    notes = [*check_compatibility(config, precision), *extra_settings(config)[1]]
    encoder = load_encoder(config.model.tokenizer_path) if _has_tokenizer(config.model) else None
    hf_config = load.architecture_of(config.model) if encoder is None else load.read_config(config.model, encoder)
    if encoder is None and config.model.init is ModelInit.scratch and "vocab_size" not in config.model.architecture:
        rows = hf_config.get_text_config().vocab_size
        notes.append(f"note: no tokenizer at {config.model.tokenizer} yet: vocab_size={rows} was assumed")
    data = summarize_data(config, None if encoder is None else encoder.fingerprint())
    family = load.family_of(hf_config)
    new_rows_from = load.base_vocab_size(config.model, hf_config)
    model = tuning.apply_tuning(load.bare_model(hf_config), family, config.tuning, new_rows_from, config.seed)
    rows = param_groups.summarize_groups(model, config, precision)
    notes += param_groups.notes_on_experts(model, config)
    total, trainable = param_groups.count_parameters(model)

    training_plan = make_plan(config, model_shape(model, config), step_flops(model), precision, data)
    if config.format is PlanFormat.json:
        metadata = {"parameters": total, "trainable_parameters": trainable, "groups": [asdict(row) for row in rows]}
        print(json.dumps(metadata | plan_report.as_json(training_plan, notes)))
        return
    print(
        f"{trainable:,} of {total:,} parameters train\n{param_groups.format_groups(rows)}\n"
        f"{plan_report.format_plan(training_plan, notes)}"
    )


def _has_tokenizer(config: ModelConfig) -> bool:
    """True where the tokenizer exists; a model can also be planned from its architecture alone."""
    return bool((config.tokenizer or config.path) and Path(config.tokenizer_path).exists())


if __name__ == "__main__":
    app.main(plan, __doc__)
