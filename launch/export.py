"""Export a run as a Hugging Face directory that loads with nothing of ours installed.

    python launch/export.py run=demo/cpt
    python launch/export.py run=sft out=models/my-chinese-llama dtype=bf16

Adapters are merged in float32. What was written is loaded again with plain transformers and its logits compared.
"""

import json
from pathlib import Path

from fireflyds import app
from fireflyds.config import ExportConfig, Precision, TrainConfig, TuningMethod
from fireflyds.directories import write_aside
from fireflyds.errors import UserError


def export(config: ExportConfig) -> None:
    run_dir = Path(config.runs) / config.run
    if not (run_dir / "config.yaml").is_file():
        known = sorted(str(path.parent.relative_to(config.runs)) for path in Path(config.runs).glob("**/config.yaml"))
        raise UserError(f"run={config.run}: no such run in {config.runs}. Known: {', '.join(known) or 'none'}")
    trained = app.from_yaml(run_dir / "config.yaml", TrainConfig)

    # Heavy imports come after the checks above.
    from fireflyds.data.store import read_manifest
    from fireflyds.engine import checkpoint, deepspeed
    from fireflyds.models import load, publish, tuning
    from fireflyds.tokenizer.encoder import load_encoder

    step = checkpoint.find(run_dir, config.step)
    encoder = load_encoder(trained.model.tokenizer_path)
    hf_config = load.read_config(trained.model, encoder)
    precision = deepspeed.resolve_precision(trained.hardware)
    adapters_only = trained.tuning.method is not TuningMethod.full
    loaded = load.load_model(
        trained.model, hf_config, precision, trained.seed, tuning.quantization(trained.tuning, precision)
    )
    model = tuning.apply(loaded.model, loaded.family, trained.tuning, trained.seed)
    tuning.restore(model, checkpoint.trained_weights(step, adapters_only=adapters_only), step)
    weights = tuning.merged_state_dict(model) if adapters_only else model.state_dict()

    dtype = precision if config.dtype is Precision.auto else config.dtype
    out = Path(config.out or run_dir / "export")
    with write_aside(out, marker="config.json") as folder:
        publish.write_weights(folder, hf_config, weights, load.DTYPES[dtype])
        template = read_manifest(Path(trained.data.store))["template"]
        publish.write_tokenizer_files(folder, Path(trained.model.tokenizer_path), encoder, template)
        about = {"run": config.run, "checkpoint": step.name, "dtype": dtype.name, "template": template}
        if config.verify:
            about["reload_max_rel_diff"] = publish.reload_difference(folder, model, encoder, dtype)
        publish.write_model_card(folder, trained, about)
        (folder / "export.json").write_text(json.dumps(about, indent=2), encoding="utf-8")
    print(f"wrote {out}: {json.dumps(about)}")


if __name__ == "__main__":
    app.main(export, __doc__)
