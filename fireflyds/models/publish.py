"""A trained model as a Hugging Face directory: weights, tokenizer, chat template, generation settings, card."""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig

from fireflyds import registry
from fireflyds.config import Precision, TrainConfig
from fireflyds.errors import UserError
from fireflyds.models.fuse import fuse, hidden_states
from fireflyds.models.load import load_for_inference
from fireflyds.models.precision import DTYPES, is_emulated
from fireflyds.types import EOS, Encoder

# A reloaded model computes the same logits, up to the rounding of its number format.
TOLERANCE = {Precision.fp32: 1e-5, Precision.bf16: 5e-2, Precision.fp16: 1e-2}


def write_weights(folder: Path, hf_config: Any, weights: dict[str, Tensor], dtype: torch.dtype) -> None:
    """Safetensors and `config.json` of the plain model.

    Raises:
        UserError: the weights are not those of the configured architecture.
    """
    plain_config = copy.deepcopy(hf_config)
    if hasattr(plain_config, "quantization_config"):
        del plain_config.quantization_config
    model = AutoModelForCausalLM.from_config(plain_config, dtype=dtype)
    try:
        found = model.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        reason = str(error).splitlines()[1].strip()
        raise UserError(f"the trained weights do not fit {plain_config.model_type}: {reason}") from error
    tied = {"lm_head.weight"} if plain_config.tie_word_embeddings else set()
    wrong = sorted(set(found.missing_keys) - tied) + found.unexpected_keys
    if wrong:
        raise UserError(f"the trained weights do not fit {plain_config.model_type}: {wrong[0]} is missing or unknown")
    model.save_pretrained(folder)


def write_chat_settings(folder: Path, encoder: Encoder, template: str | None) -> None:
    """`generation_config.json`; with a template, its Jinja form too, and the token at which generation stops."""
    stop = encoder.eos_id
    if template is not None:
        chat = registry.find("fireflyds.data.templates", template).CHAT
        (folder / "chat_template.jinja").write_text(chat.jinja, encoding="utf-8")
        stop = encoder.eos_id if chat.stop == EOS else encoder.token_id(chat.stop)
    settings = GenerationConfig(bos_token_id=encoder.bos_id, eos_token_id=stop, pad_token_id=encoder.eos_id)
    settings.save_pretrained(folder)


def reload_difference(folder: Path, trained: Any, encoder: Encoder, dtype: Precision) -> float:
    """Largest difference between the logits of the directory, loaded by plain transformers, and of the trained
    model in its packed forward pass, relative to the largest logit.

    Raises:
        UserError: it is larger than the number format explains.
    """
    device = trained.device
    ids = torch.randint(0, encoder.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0)).to(device)
    trained = fuse(trained.eval())
    for module in trained.modules():
        # In evaluation mode 8-bit layers round their inputs too, which merged weights do not show.
        if getattr(getattr(module, "weight", None), "dtype", None) is torch.int8 and not hasattr(module, "lora_A"):
            module.train()
    compute_in = torch.float32 if is_emulated(trained.dtype) else trained.dtype
    for parameter in trained.parameters():
        if parameter.is_floating_point():  # float32 adapters beside a half-precision base
            parameter.data = parameter.data.to(compute_in)
    for module in trained.modules():
        if getattr(module, "compute_dtype", None) in DTYPES.values():  # 4-bit layers
            module.compute_dtype = compute_in
    with torch.no_grad():
        positions = torch.arange(64, device=device)[None]
        boundaries = torch.tensor([0, 64], dtype=torch.int32, device=device)
        hidden = hidden_states(trained, ids, positions, boundaries, 64)
        ours = trained.get_output_embeddings()(hidden).float().cpu()
        theirs = load_for_inference(folder)(ids).logits.float().cpu()
    difference = float((ours - theirs).abs().max() / ours.abs().max())
    if not difference <= TOLERANCE[dtype]:
        raise UserError(
            f"{folder}: logits differ from the trained model's by {difference:.1e}, more than {TOLERANCE[dtype]:.0e}. Nothing was written"
        )
    return difference


def write_model_card(folder: Path, trained: TrainConfig, about: dict[str, Any], languages: Sequence[str]) -> None:
    """`README.md` with the metadata that hubs read. `languages`: codes of what the run trained on, as its sources name them."""
    base = trained.model.path or "none (from scratch)"
    lines = [
        "---",
        "library_name: transformers",
        "pipeline_tag: text-generation",
        *([f"language: [{', '.join(languages)}]"] if languages else []),
        *([f"base_model: {base}"] if trained.model.path else []),
        "---",
        "",
        f"# {trained.run}",
        "",
        f"Trained with fireflyds from {base}: {trained.tuning.method.name}, learning rate {trained.optim.lr:g} "
        f"({trained.optim.schedule.name}), {trained.global_batch_size} packed rows of {trained.seq_len} tokens a step, "
        f"{about['checkpoint']}.",
        "",
        "```json",
        json.dumps(about, indent=2),
        "```",
        "",
    ]
    (folder / "README.md").write_text("\n".join(lines), encoding="utf-8")
