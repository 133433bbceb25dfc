"""Export a run as a Hugging Face directory that loads with nothing of ours installed.

    python launch/export.py run=demo/cpt
    python launch/export.py run=sft out=models/my-chinese-llama dtype=bf16
    python launch/export.py run=sft artifact=true

Adapters are merged in float32. What was written is loaded again with plain transformers and its logits compared.
"""

import json
from pathlib import Path

from fireflyds import app
from fireflyds.config import ExportConfig, Precision, TrainConfig, TuningMethod, WandbMode
from fireflyds.directories import Output, write_aside
from fireflyds.engine import trackers
from fireflyds.engine.run_names import find_run
from fireflyds.errors import UserError


def export(config: ExportConfig) -> None:
    run_dir = find_run(config.runs, "run", config.run)
    trained = app.from_yaml(run_dir / "config.yaml", TrainConfig)
    if config.artifact:
        trackers.check_artifact(trained.tracking, config.run)

    # Heavy imports come after the checks above.
    from fireflyds.engine import checkpoint, learnt, run
    from fireflyds.models import publish, tuning
    from fireflyds.models.load import read_config
    from fireflyds.models.merge import merged_state_dict
    from fireflyds.models.precision import DTYPES, resolve_precision
    from fireflyds.tokenizer.directory import copy_tokenizer
    from fireflyds.tokenizer.encoder import load_encoder

    recorded = run.read_inputs(run_dir)
    run.require_base(config.run, trained.model.path, recorded)
    out = Path(config.out or run_dir / "export")
    if trained.model.path and out.resolve() == Path(trained.model.path).resolve():
        raise UserError(f"out={out}: is the run's base itself. Give another folder")
    step = checkpoint.find(run_dir, config.step)
    encoder = load_encoder(trained.model.tokenizer_path)
    hf_config = read_config(trained.model, encoder)
    trained_in = resolve_precision(trained.hardware)
    # Trained tensors are float32 in the checkpoint and stay so here; a quantised base is what it was in training.
    quantised = trained.tuning.method is TuningMethod.qlora
    model = tuning.load_tuned(trained, hf_config, trained_in if quantised else Precision.fp32)
    learnt.restore(model, run_dir, step)
    weights = merged_state_dict(model)

    dtype = trained_in if config.dtype is Precision.auto else config.dtype
    with write_aside(out, Output("export")) as folder:
        publish.write_weights(folder, hf_config, weights, DTYPES[dtype])
        copy_tokenizer(Path(trained.model.tokenizer_path), folder)
        publish.write_chat_settings(folder, encoder, recorded["template"])
        about = {"run": config.run, "checkpoint": step.name, "dtype": dtype.name, "template": recorded["template"]}
        if config.verify:
            coarser = dtype if not quantised or dtype is not Precision.fp32 else trained_in
            about["reload_max_rel_diff"] = publish.reload_difference(folder, model, encoder, coarser)
        publish.write_model_card(folder, trained, about, recorded["languages"])
        (folder / "export.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
    print(f"wrote {out}: {json.dumps(about)}")
    if config.artifact:
        name = trackers.send_artifact(trained.tracking, config.run, run_dir, out, about)
        later = f"; send it with `wandb sync {run_dir}/wandb/offline-run-*`"
        print(f"{out} is the artifact {name} of its W&B run{later * (trained.tracking.mode is WandbMode.offline)}")


if __name__ == "__main__":
    app.main(export, __doc__)
