"""Writing of a trained model as a Hugging Face directory: weights, chat template, generation settings, model card."""

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize
from transformers import GenerationConfig

from fireflyds.config import Precision, TrainConfig
from fireflyds.data.chat_template import OWN, find_template
from fireflyds.data.encode import stop_id
from fireflyds.errors import UserError
from fireflyds.export.file_layout import as_in_files, names_in_files, tensors_left_out
from fireflyds.export.older_readers import with_older_keys
from fireflyds.fs import read_json
from fireflyds.hub import name_of
from fireflyds.models.load import bare_model, load_for_inference
from fireflyds.models.packed.forward import fuse, hidden_states
from fireflyds.models.precision import DTYPES, is_emulated
from fireflyds.models.tuning import keeps_training_mode
from fireflyds.tokenizer.shards import TensorEntry, save_sharded
from fireflyds.types import Encoder, PackedBatch

_BASE_REMEDY = "Restore the base, or train again under another run="
# Largest difference of logits between the trained and the reloaded model, relative to the largest logit: rounding only.
TOLERANCE = {Precision.fp32: 1e-5, Precision.bf16: 5e-2, Precision.fp16: 1e-2}


def write_weights(
    folder: Path,
    hf_config: Any,
    entries: dict[str, TensorEntry],
    dtype: torch.dtype,
    base: Path | None = None,
) -> int:
    """Writes `config.json` and safetensors shards, tensor by tensor.

    Weights are named and laid out as in files of the architecture. What the files of `base` have beside the trained
    model, such as a tower for images, is copied as it is.

    Returns:
        The number of tensors that were copied.

    Raises:
        UserError: names or shapes of the weights are not those of the architecture.
    """
    plain_config = copy.deepcopy(hf_config)
    if hasattr(plain_config, "quantization_config"):
        del plain_config.quantization_config
    plain_config.dtype = dtype
    model = bare_model(plain_config)
    plain_config.architectures = [type(model).__name__]
    tied = set(model.all_tied_weights_keys)
    entries = {name: entry for name, entry in entries.items() if name not in tied}
    expected = {name: [*tensor.shape] for name, tensor in model.state_dict().items()}
    for name, entry in entries.items():
        if expected.get(name) != entry.shape:
            raise UserError(
                f"the trained weights do not match {plain_config.model_type}: {name} is {entry.shape}, the "
                f"architecture has {expected.get(name, 'no such weight')}",
                key="run",
                remedy=_BASE_REMEDY,
            )
    missing = expected.keys() - entries.keys() - tied
    if missing:
        raise UserError(
            f"the trained weights do not match {plain_config.model_type}: {min(missing)} is missing",
            key="run",
            remedy=_BASE_REMEDY,
        )
    if getattr(plain_config, "normalized_head", False) and not plain_config.other_readers_normalize:
        entries["lm_head.weight"] = _with_unit_rows(entries["lm_head.weight"])
    plain_config.save_pretrained(folder)
    settings = with_older_keys(read_json(folder / "config.json"))
    (folder / "config.json").write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")
    copied = {} if base is None else tensors_left_out(model, base)
    written = as_in_files(model, entries, set() if base is None else names_in_files(base))
    save_sharded(folder, written | copied)
    if base is not None:
        # Settings of the images' processor, and what `auto_map` of the base's config.json names.
        for pattern in ("*processor_config.json", *["*.py"] * hasattr(plain_config, "auto_map")):
            for file in base.glob(pattern):
                shutil.copy2(file, folder)
    return len(copied)


def _with_unit_rows(entry: TensorEntry) -> TensorEntry:
    """Rows divided by their norms: dividing again, as the model does, changes nothing but rounding."""
    return TensorEntry(entry.shape, entry.dtype, lambda: normalize(entry.make().float()).to(entry.dtype))


def write_chat_settings(folder: Path, encoder: Encoder, template: str | None) -> None:
    """Writes `generation_config.json`; with a template also `chat_template.jinja`, and its stop token before EOS. The
    tokenizer's own template stands in the folder already, byte for byte."""
    stops = [encoder.eos_id]
    if template is not None:
        chat = find_template(encoder, template)
        stops = [stop_id(encoder, chat), encoder.eos_id]
    if template not in (None, OWN):
        (folder / "chat_template.jinja").write_text(chat.jinja, encoding="utf-8")
        _remove_other_templates(folder)
    stops = [stop for stop in dict.fromkeys(stops) if stop is not None]
    settings = GenerationConfig(
        bos_token_id=encoder.bos_id,
        eos_token_id=stops[0] if len(stops) == 1 else stops or None,
        pad_token_id=encoder.eos_id,
    )
    settings.save_pretrained(folder)


def _remove_other_templates(folder: Path) -> None:
    """Removes the base's chat template from `tokenizer_config.json`: readers differ in which one they take."""
    file = folder / "tokenizer_config.json"
    settings = read_json(file) if file.is_file() else {}
    if settings.pop("chat_template", None) is not None:
        file.write_text(json.dumps(settings, ensure_ascii=False, indent=2), encoding="utf-8")


def probe_ids(vocab_size: int) -> Tensor:
    """Returns 64 random token ids, int64 `[1, 64]`, the same for every model of this vocabulary size."""
    return torch.randint(0, vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def trained_logits(model: Any, ids: Tensor, *, packed: bool = True) -> Tensor:
    """Returns the logits `[1, 64, V]` of the forward pass that a tuned model is trained with, float32 on the host.

    The model is modified in place: it is fused, and its weights are cast.
    """
    device, model = model.device, fuse(model.eval(), packed=packed)
    for module in model.modules():
        if keeps_training_mode(module):
            module.train()
    compute_dtype = torch.float32 if is_emulated(model.dtype) else model.dtype
    for parameter in model.parameters():
        if parameter.is_floating_point():  # adapters are float32 where the base is in half precision
            parameter.data = parameter.data.to(compute_dtype)
    for module in model.modules():
        if getattr(module, "compute_dtype", None) in DTYPES.values():  # 4-bit layers
            module.compute_dtype = compute_dtype
    inputs = PackedBatch.from_documents(ids.tolist(), learned=False).model_inputs(device)
    names = ("input_ids", "position_ids", "cu_seqlens", "max_seqlen")
    hidden = hidden_states(model, **{name: inputs[name] for name in names})
    return model.get_output_embeddings()(hidden).float().cpu()  # type: ignore[no-any-return]


@torch.no_grad()
def reload_difference(folder: Path, ids: Tensor, trained_logits: Tensor, dtype: Precision) -> float:
    """Returns the largest difference between the logits of the directory, loaded with plain transformers, and
    `trained_logits`, relative to the largest trained logit.

    Raises:
        UserError: the difference exceeds the rounding error of the format (`TOLERANCE`).
    """
    model = load_for_inference(folder, or_on_cpu=True)
    logits = model(ids.to(model.device)).logits.float().cpu()
    difference = float((trained_logits - logits).abs().max() / trained_logits.abs().max())
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"logits differ from the trained model's by {difference:.1e}, more than {TOLERANCE[dtype]:.0e}; nothing "
            "was written",
            remedy="Export with dtype=fp32; if it differs there too, report it with the base model",
        )
    return difference


def write_model_card(folder: Path, trained: TrainConfig, metadata: dict[str, Any], languages: Sequence[str]) -> None:
    """Writes `README.md` with the metadata block of the Hugging Face Hub.

    `about`: metadata of the run, with the key `checkpoint`. `languages`: language codes of the training data.
    """
    base = name_of(trained.model.path) or "none (from scratch)"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"language: [{', '.join(languages)}]"] if languages else []),
        *([f"base_model: {base.partition('@')[0]}"] if trained.model.path else []),
        "---",
        "",
        f"# {trained.run}",
        "",
        f"Trained with fireflyds from {base}: {trained.tuning.method.name}, learning rate {trained.optim.lr:g} "
        f"({trained.optim.schedule.name}), {trained.global_batch_size} packed rows of {trained.seq_len} tokens per "
        f"step, {metadata['checkpoint']}.",
        "",
        "```json",
        json.dumps(metadata, indent=2),
        "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
