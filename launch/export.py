"""Export a run as a Hugging Face directory that loads without fireflyds.

    python launch/export.py run=demo/cpt
    python launch/export.py run=sft out=models/my-chinese-llama dtype=bf16
    python launch/export.py run=sft what=adapter
    python launch/export.py run=sft artifact=true

Adapters are merged in float32, one matrix at a time. The written model is reloaded with plain transformers and its
logits are compared. `what=adapter` writes the adapters alone, in PEFT's format.
"""

import json
from pathlib import Path
from typing import Any

from fireflyds import app, hub
from fireflyds.config import ExportConfig, ExportWhat, Precision, TrainConfig, TuningMethod, WandbMode
from fireflyds.errors import UserError
from fireflyds.fs import Output, atomic_dir
from fireflyds.metrics import trackers
from fireflyds.runs import fingerprint, layout
from fireflyds.runs.find import find_run


def export(config: ExportConfig) -> None:
    """Writes the run's model, or its adapters, as a directory, and uploads it if `artifact` is set.

    Raises:
        UserError: the run, its base model or its checkpoint is not usable, or `out` is the base model.
    """
    run_dir = find_run(config.runs, "run", config.run)
    train_config = app.from_yaml(run_dir / layout.CONFIG, TrainConfig)
    if config.artifact:
        trackers.require_wandb_run(train_config.tracking, config.run)
    inputs = fingerprint.read_inputs(run_dir)
    fingerprint.require_base(config.run, train_config.model.path, inputs)
    out = Path(config.out or run_dir / ("adapter" if config.what is ExportWhat.adapter else layout.EXPORT))
    if train_config.model.path and out.resolve() == Path(train_config.model.path).resolve():
        raise UserError("is the base model of the run", key="out", value=out, remedy="Give another folder")
    # Heavy imports come after the checks above.
    from fireflyds.checkpoint.restore import find_checkpoint

    checkpoint = find_checkpoint(run_dir, config.step)
    metadata: dict[str, Any] = {"run": config.run, "checkpoint": checkpoint.name, "template": inputs["template"]}
    if config.what is ExportWhat.adapter:
        write_adapter(config, train_config, checkpoint, out)
    else:
        write_model(config, train_config, checkpoint, out, metadata, inputs)
    print(f"wrote {out}: {json.dumps(metadata)}")
    if config.hub:
        print(f"uploaded to {hub.push(out, config.hub, private=config.hub_private)}")
    if config.artifact:
        name = trackers.log_model_artifact(train_config.tracking, config.run, run_dir, out, metadata)
        sync_hint = f"; send it with `wandb sync {run_dir / layout.WANDB}/offline-run-*`"
        offline = train_config.tracking.mode is WandbMode.offline
        print(f"{out} is the artifact {name} of its W&B run{sync_hint * offline}")


def write_model(
    config: ExportConfig,
    trained: TrainConfig,
    checkpoint: Path,
    out: Path,
    metadata: dict[str, Any],
    inputs: dict[str, Any],
) -> None:
    """Writes the merged model. Memory: the model and one merged matrix at a time. `inputs`: the record of the run."""
    from fireflyds.checkpoint.init_from import restore_weights
    from fireflyds.export import publish
    from fireflyds.export.merged_weights import merged_entries
    from fireflyds.models.load import read_config
    from fireflyds.models.precision import DTYPES, resolve_precision
    from fireflyds.models.tuning import load_tuned_model
    from fireflyds.tokenizer.encoder import load_encoder
    from fireflyds.tokenizer.hf_files import copy_tokenizer

    encoder = load_encoder(trained.model.tokenizer_path)
    hf_config = read_config(trained.model, encoder)
    # As trained, wherever this runs: the machine at hand may have no bf16, or choose another format by itself.
    training_precision = (
        Precision[inputs["precision"]] if "precision" in inputs else resolve_precision(trained.hardware)
    )
    # Trained tensors stay in float32, as in the checkpoint; a quantised base has the same dtype as in training.
    quantised = trained.tuning.method is TuningMethod.qlora
    model = load_tuned_model(trained, hf_config, training_precision if quantised else Precision.fp32)
    restore_weights(model, Path(trained.run_dir), checkpoint)
    dtype = training_precision if config.dtype is Precision.auto else config.dtype
    metadata["dtype"] = dtype.name
    with atomic_dir(out, Output("export")) as folder:
        base = Path(trained.model.path) if trained.model.path else None
        copied = publish.write_weights(folder, hf_config, merged_entries(model, DTYPES[dtype]), DTYPES[dtype], base)
        metadata |= {"tensors_copied_from_base": copied} if copied else {}
        copy_tokenizer(Path(trained.model.tokenizer_path), folder)
        publish.write_chat_settings(folder, encoder, metadata["template"])
        if config.verify:
            ids = publish.probe_ids(encoder.vocab_size)
            logits = publish.trained_logits(model, ids, packed=trained.packing)
            del model
            precision = dtype if not quantised or dtype is not Precision.fp32 else training_precision
            metadata["reload_max_rel_diff"] = publish.reload_difference(folder, ids, logits, precision)
        publish.write_model_card(folder, trained, metadata, inputs["languages"])
        (folder / "export.json").write_text(json.dumps(metadata, indent=2), encoding="utf-8")


def write_adapter(config: ExportConfig, trained: TrainConfig, checkpoint: Path, out: Path) -> None:
    """Writes the adapters alone, in PEFT's format."""
    from fireflyds.checkpoint.init_from import read_trainable_weights
    from fireflyds.checkpoint.trainable_files import save_trainable_weights

    trainable = read_trainable_weights(checkpoint)
    if not trainable.adapters:
        raise UserError(
            f"the run {config.run} has no adapters (tuning={trained.tuning.method.name})",
            key="what",
            value="adapter",
            remedy="Use what=merged",
        )
    with atomic_dir(out, Output("export of an adapter")) as folder:
        save_trainable_weights(trainable, folder)


if __name__ == "__main__":
    app.main(export, __doc__)
