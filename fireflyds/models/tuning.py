"""Trainable parameters: full, freeze (by name), LoRA, QLoRA on a quantised base; plus rows of embeddings and head."""

import re
from collections.abc import Container, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fireflyds.config import Precision, TrainConfig, TuningConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.models.architecture import LINEAR, READ_DIRECTLY
from fireflyds.models.expert_adapters import expert_targets, keep_in_float32
from fireflyds.models.load import base_vocab_size, load_model
from fireflyds.models.precision import DTYPES
from fireflyds.models.split_embeddings import split_new_rows
from fireflyds.types import Family

ADAPTER = "default"
_NOT_QUANTISED = ("lm_head", *READ_DIRECTLY)


def quantization_config(config: TuningConfig, precision: Precision, zero_stage: int) -> Any:
    """Returns QLoRA's `BitsAndBytesConfig`: NF4 with double quantisation (arXiv 2305.14314) or LLM.int8; else None.

    Embeddings and head are not quantised, as they may be trainable. ZeRO-3 shards the storage, so there 4-bit weights
    are stored in the dtype of the model; at other stages in uint8.
    """
    if config.method is not TuningMethod.qlora:
        return None
    from transformers import BitsAndBytesConfig

    if config.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(_NOT_QUANTISED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=DTYPES[precision],
        bnb_4bit_quant_storage=DTYPES[precision] if zero_stage == 3 else torch.uint8,
        llm_int8_skip_modules=list(_NOT_QUANTISED),
    )


def load_tuned_model(config: TrainConfig, hf_config: Any, precision: Precision, *, deferred: bool = False) -> Any:
    """Loads the model of a run: weights in `precision`, quantised under QLoRA, `requires_grad` set by the tuning.

    `deferred`: its weights are read later, one by one, except under DoRA, whose magnitudes are norms of them.
    """
    options = quantization_config(config.tuning, precision, config.zero.stage)
    deferred = deferred and not config.tuning.use_dora
    loaded = load_model(config.model, hf_config, precision, config.seed, options, deferred=deferred)
    rows = base_vocab_size(config.model, hf_config)
    return apply_tuning(loaded.model, loaded.family, config.tuning, rows, config.seed)


def apply_tuning(model: Any, family: Family, config: TuningConfig, base_vocab_size: int | None, seed: int) -> Any:
    """Sets `requires_grad`, and inserts adapters and split embeddings, in place. The class of the model is unchanged.

    Raises:
        UserError: names that match no parameter or layer, no trainable parameter, an unknown first new row, or linear
            layers that are not quantised under QLoRA.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # In evaluation mode bitsandbytes would repack the weights irreversibly, to a layout that only it reads.
            module.support_avx512bf16_for_cpu = False
    if config.method is not TuningMethod.full:
        model.requires_grad_(False)
    if config.method is TuningMethod.freeze:
        _unfreeze(model, list(config.trainable))
    if family.transposed and config.method is TuningMethod.qlora:
        raise UserError(
            f"the linear layers of {type(model).__name__} are Conv1D, which are not quantised here",
            key="tuning",
            value="qlora",
            remedy="Use tuning=lora",
        )
    if config.has_adapters:
        from peft import inject_adapter_in_model

        torch.manual_seed(seed)
        with _adapters_on_the_cpu() if _is_deferred(model) else nullcontext(), _targets_as_given():
            inject_adapter_in_model(adapter_config(model, family, config), model, ADAPTER)
        keep_in_float32(model, ADAPTER)
    split_new_rows(model, config, base_vocab_size)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(
            "no parameter is trainable",
            key="tuning",
            value=config.method.name,
            remedy="Give tuning.trainable=[<expression>], or rows of tuning.embeddings and tuning.head",
        )
    return model


def _is_deferred(model: nn.Module) -> bool:
    return any(hasattr(parameter, "read") for parameter in model.parameters())


@contextmanager
def _adapters_on_the_cpu() -> Iterator[None]:
    """Context in which new adapters stay on the CPU, with their values, where PEFT would move them to the device of
    weights on the meta device."""
    move = nn.Module.to

    def move_unless_meta(module: nn.Module, device: Any = None, **options: Any) -> nn.Module:
        is_meta = isinstance(device, torch.device) and device.type == "meta"
        return (
            move(module, **options) if is_meta and options else module if is_meta else move(module, device, **options)
        )

    nn.Module.to = move_unless_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.to = move  # type: ignore[method-assign]


@contextmanager
def _targets_as_given() -> Iterator[None]:
    """Context in which PEFT takes the targets as names of this model's modules. Otherwise it renames those of some
    mixtures of experts, as they were called in transformers 4, to parameters of the experts."""
    from peft.utils import transformers_weight_conversion

    convert = transformers_weight_conversion.convert_peft_config_for_transformers
    transformers_weight_conversion.convert_peft_config_for_transformers = lambda *_, **__: None
    try:
        yield
    finally:
        transformers_weight_conversion.convert_peft_config_for_transformers = convert


def adapter_config(model: nn.Module, family: Family, config: TuningConfig) -> Any:
    """Returns PEFT's `LoraConfig` of the adapters."""
    from peft import LoraConfig

    return LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # type: ignore[arg-type]
        lora_dropout=config.dropout,
        target_modules=_resolve_targets(model, list(config.target_modules)) or list(family.linear_layers),
        target_parameters=expert_targets(model) if config.experts else None,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
        fan_in_fan_out=family.transposed,
        task_type="CAUSAL_LM",
    )


def adapter_config_of(model: Any) -> Any:
    """Returns PEFT's `LoraConfig` of the adapters in a model, or None."""
    return getattr(model, "peft_config", {}).get(ADAPTER)


def _resolve_targets(model: Any, patterns: list[str]) -> list[str]:
    """Resolves `tuning.target_modules` for PEFT.

    Plain names are returned unchanged; with a regular expression among them, the full names of all matching layers.

    Raises:
        UserError: a pattern that matches no linear layer of the body.
    """
    head = model.get_output_embeddings()
    linear = [name for name, module in model.named_modules() if isinstance(module, LINEAR) and module is not head]
    targets: set[str] = set()
    for pattern in patterns:
        matches = [name for name in linear if name.endswith(f".{pattern}") or _full_match(pattern, name)]
        if not matches:
            known = ", ".join(sorted({name.rsplit(".", 1)[-1] for name in linear}))
            raise UserError(
                f"{pattern!r} matches no linear layer",
                key="tuning.target_modules",
                value=patterns,
                remedy=f"Known: {known}",
            )
        targets.update(matches)
    return patterns if all(re.fullmatch(r"\w+", pattern) for pattern in patterns) else sorted(targets)


def _full_match(expression: str, name: str) -> bool:
    """True where `expression` matches the whole of `name`. Raises `UserError` for an invalid expression."""
    try:
        return re.fullmatch(expression, name) is not None
    except re.error as error:
        raise UserError(
            f"{expression!r} is not a valid regular expression ({error})",
            key="tuning.target_modules",
            remedy="Correct it, or give the names of layers",
        ) from error


def _unfreeze(model: Any, expressions: list[str]) -> None:
    """Makes the matching parameters of the body trainable, in float32; embeddings and head are excluded."""
    parameters = dict(model.named_parameters())
    vocabulary = {id(module.weight) for module in (model.get_input_embeddings(), model.get_output_embeddings())}
    for expression in expressions:
        try:
            matches = [name for name in parameters if re.search(expression, name)]
        except re.error as error:
            raise UserError(
                f"{expression!r} is not a valid regular expression ({error})",
                key="tuning.trainable",
                remedy="Correct it, or give parts of parameter names",
            ) from error
        if not matches:
            raise UserError(
                f"{expression!r} matches no parameter",
                key="tuning.trainable",
                value=expressions,
                remedy=f"Examples of names: {', '.join(list(parameters)[1:6])}",
            )
        matches = [name for name in matches if id(parameters[name]) not in vocabulary]
        if not matches:
            raise UserError(
                f"{expression!r} matches only embeddings or head",
                key="tuning.trainable",
                value=expressions,
                remedy="Leave it out, and give tuning.embeddings and tuning.head, which set which of their rows train",
            )
        for name in matches:
            parameters[name].data = parameters[name].data.float()
            parameters[name].requires_grad_(True)


def is_quantised(weight: Any) -> bool:
    """True for a weight quantised by bitsandbytes, to 4 or 8 bits."""
    return isinstance(weight, Tensor) and (
        getattr(weight, "quant_state", None) is not None
        or weight.dtype is torch.int8
        or type(weight).__name__ == "Params4bit"
    )


def keeps_training_mode(module: nn.Module) -> bool:
    """True for an 8-bit layer: in evaluation mode it would also quantise its inputs, which merged weights do not do."""
    return getattr(getattr(module, "weight", None), "dtype", None) is torch.int8 and not hasattr(module, "lora_A")


def float_weight(layer: Any) -> Tensor:
    """Returns the weight of a linear layer in float32, dequantised where necessary."""
    weight = layer.weight
    if not is_quantised(weight):
        return weight.float()  # type: ignore[no-any-return]
    from peft.utils.integrations import dequantize_bnb_weight

    return dequantize_bnb_weight(weight, state=getattr(layer, "state", None)).float()  # type: ignore[no-any-return]


def adapted_direction(layer: Any) -> Tensor:
    """Returns W + scaling · B A of a LoRA layer in float32; under DoRA this is the direction, before its magnitudes."""
    a, b = layer.lora_A[ADAPTER].weight.float(), layer.lora_B[ADAPTER].weight.float()
    update = layer.scaling[ADAPTER] * (b @ a)
    return float_weight(layer.base_layer) + (update.T if layer.fan_in_fan_out else update)


@torch.no_grad()
def reset_dora_magnitudes(model: nn.Module, except_names: Container[str]) -> None:
    """Sets DoRA's magnitudes to the row norms of the adapted weights, for weights that were loaded after the adapters.

    `except_names`: names (without the adapter's name) of trained magnitudes, which are left unchanged.
    """
    for name, module in model.named_modules():
        is_excepted = f"{name}.lora_magnitude_vector" in except_names
        if ADAPTER in getattr(module, "lora_magnitude_vector", {}) and not is_excepted:
            weight = adapted_direction(module)
            outputs = 0 if module.fan_in_fan_out else 1
            module.lora_magnitude_vector[ADAPTER].weight.copy_(torch.linalg.norm(weight, dim=outputs))
