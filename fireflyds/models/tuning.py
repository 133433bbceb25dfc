"""What trains: everything, parameters by name, adapters, adapters on a quantised base; the vocabulary's rows beside them."""

import re
from collections.abc import Container
from typing import Any

import torch
from torch import Tensor, nn

from fireflyds.config import Precision, TrainConfig, TuningConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.models.load import base_vocab_size, load_model
from fireflyds.models.precision import DTYPES
from fireflyds.models.split_embeddings import split_new_rows
from fireflyds.types import Family

ADAPTER = "default"


def quantization_config(config: TuningConfig, precision: Precision, zero_stage: int) -> Any:
    """The loading option of QLoRA: NF4 with double quantisation (arXiv 2305.14314) or LLM.int8; None otherwise.

    Embeddings and head keep their number format: they may train. ZeRO-3 shards what is stored, so there 4-bit weights
    are stored in numbers of the model's own format; elsewhere in bytes.
    """
    if config.method is not TuningMethod.qlora:
        return None
    from transformers import BitsAndBytesConfig

    if config.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=["lm_head"])
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[precision],
        bnb_4bit_quant_storage=DTYPES[precision] if zero_stage == 3 else torch.uint8,
        llm_int8_skip_modules=["lm_head"],
    )


def load_tuned_model(config: TrainConfig, hf_config: Any, precision: Precision) -> Any:
    """The model of a run: its weights in `precision`, quantised where that is asked, with what trains marked."""
    options = quantization_config(config.tuning, precision, config.zero.stage)
    loaded = load_model(config.model, hf_config, precision, config.seed, options)
    rows = base_vocab_size(config.model, hf_config)
    return apply_tuning(loaded.model, loaded.family, config.tuning, rows, config.seed)


def apply_tuning(model: Any, family: Family, config: TuningConfig, base_vocab_size: int | None, seed: int) -> Any:
    """Mark what trains, and put adapters and split matrices in place. The model keeps its class.

    Raises:
        UserError: names that fit nothing, nothing that trains, or rows that cannot be told apart.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In evaluation mode on such a CPU bitsandbytes would repack the weights for good, and nothing else reads that.
            module.support_avx512bf16_for_cpu = False
    if config.method is not TuningMethod.full:
        model.requires_grad_(False)
    if config.method is TuningMethod.freeze:
        _unfreeze(model, list(config.trainable))
    if config.has_adapters:
        from peft import inject_adapter_in_model

        torch.manual_seed(seed)
        inject_adapter_in_model(adapter_config(model, family, config), model, ADAPTER)
    split_new_rows(model, config, base_vocab_size)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            f"tuning={config.method.name}: nothing would train. Give tuning.trainable=[<expression>], or rows of "
            "tuning.embeddings and tuning.head"
        )
    return model


def adapter_config(model: nn.Module, family: Family, config: TuningConfig) -> Any:
    """PEFT's description of the adapters."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=_targets(model, list(config.target_modules)) or list(family.linear_layers),
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        task_type="CAUSAL_LM",
    )


def adapter_config_of(model: Any) -> Any:
    """PEFT's description of the adapters in a model, or None."""
    return getattr(model, "peft_config", {}).get(ADAPTER)


def _targets(model: Any, asked: list[str]) -> list[str]:
    """Names as they are; with an expression among them, every linear layer that fits by its whole name.

    Raises:
        UserError: one that fits no linear layer of the body.
    """
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and module is not head]
    fitting: set[str] = set()
    for each in asked:
        found = [name for name in linear if name.endswith(f".{each}") or _full_match(each, name)]
        if not found:
            last = sorted({name.rsplit(".", 1)[-1] for name in linear})
            raise UserError(f"tuning.target_modules={asked}: {each!r} fits no linear layer. Known: {', '.join(last)}")
        fitting.update(found)
    return asked if all(re.fullmatch(r"\w+", each) for each in asked) else sorted(fitting)


def _full_match(expression: str, name: str) -> bool:
    try:
        return re.fullmatch(expression, name) is not None
    except re.error as error:
        raise UserError(f"tuning.target_modules: {expression!r} is no regular expression ({error})") from error


def _unfreeze(model: Any, expressions: list[str]) -> None:
    names = dict(model.named_parameters())
    vocabulary = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for expression in expressions:
        try:
            found = [name for name in names if re.search(expression, name)]
        except re.error as error:
            raise UserError(f"tuning.trainable: {expression!r} is no regular expression ({error})") from error
        if not found:
            raise UserError(
                f"tuning.trainable={expressions}: {expression!r} fits no parameter. Some there are: {', '.join(list(names)[1:6])}"
            )
        found = [name for name in found if id(names[name]) not in vocabulary]
        if not found:
            raise UserError(
                f"tuning.trainable={expressions}: {expression!r} fits embeddings or head alone; tuning.embeddings and "
                "tuning.head say which of their rows train"
            )
        for name in found:
            names[name].data = names[name].data.float()
            names[name].requires_grad_(True)


def is_quantised(weight: Any) -> bool:
    """Packed into 4 bit, or rounded to 8."""
    return isinstance(weight, Tensor) and (
        getattr(weight, "quant_state", None) is not None or weight.dtype is torch.int8
    )


def float_weight(layer: Any) -> Tensor:
    """The weight of a linear layer in float32, unpacked where it is quantised."""
    weight = layer.weight
    if not is_quantised(weight):
        return weight.float()  # type: ignore[no-any-return]
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(weight, state=getattr(layer, "state", None)).float()  # type: ignore[no-any-return]


def adapted_direction(layer: Any) -> Tensor:
    a, b = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float()
    return float_weight(layer.base_layer) + layer.scaling[ADAPTER] * (b @ a)


@torch.no_grad()
def reset_dora_magnitudes(model: nn.Module, but: Container[str]) -> None:
    """Give DoRA's magnitudes the norms of the weights they stand on, where these came after the adapters.

    `but`: magnitudes, by plain names, that were learnt.
    """
    for name, module in model.named_modules():
        if ADAPTER in getattr(module, "lora_magnitude_vector", {}) and f"{name}.lora_magnitude_vector" not in but:
            weight = adapted_direction(module)
            module.lora_magnitude_vector[ADAPTER].weight.copy_(torch.linalg.norm(weight, dim=1))
