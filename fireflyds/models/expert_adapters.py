"""LoRA on the matrices of experts: PEFT's `ParamWrapper`, one adapter of rank r for each expert of a layer.

transformers holds the matrices of all experts of a layer as one parameter, `[E, out, in]`, in some models transposed.
PEFT wraps the module that owns it once for each such parameter, so wrappers are nested. `lora_A` holds the experts one
after the other, `[E r, in]`; in `lora_B` the experts vary fastest, `[out, r E]`.
"""

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fireflyds.errors import UserError
from fireflyds.models.architecture import expert_parameters


def expert_targets(model: nn.Module) -> list[str]:
    """Full names of the parameters that hold experts.

    Raises:
        UserError: the model has none.
    """
    names = [name for name, _ in expert_parameters(model)]
    if not names:
        raise UserError(
            f"{type(model).__name__} has no experts held as one parameter",
            key="tuning.experts",
            value="true",
            remedy="Give tuning.experts=false; linear layers have adapters without it",
        )
    return names


def is_expert_adapter(module: Any) -> bool:
    """True for PEFT's wrapper of one parameter, whose name it has."""
    return hasattr(module, "lora_A") and hasattr(module, "parameter_name")


def keep_in_float32(model: nn.Module, adapter: str) -> None:
    """Casts the adapters of experts to float32, as those of quantised layers are: PEFT takes the format of the experts,
    which are in 16 bits beside a quantised base, and an export would read the trained adapters rounded."""
    wrappers: list[Any] = [module for module in model.modules() if is_expert_adapter(module)]
    for layer in wrappers:
        for part in (layer.lora_A[adapter], layer.lora_B[adapter]):
            part.weight.data = part.weight.data.float()


def plain_name(name: str) -> str:
    """The name of a parameter or module in the model without adapters."""
    return re.sub(r"\.(?:base_layer\.)+", ".", name)


def adapted_experts(layer: Any, adapter: str) -> Tensor:
    """Returns W + scaling · B A of every expert in float32, `[E, out, in]`, or transposed where the parameter is."""
    weight = layer.get_param().float()
    a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
    a = a.reshape(len(weight), -1, a.shape[1])
    b = b.reshape(len(b), -1, len(weight)).permute(2, 0, 1)
    update = b @ a
    if getattr(layer.get_base_layer(), "is_transposed", False):
        update = update.transpose(1, 2)
    return torch.add(weight, update, alpha=layer.scaling[adapter])


def other_tensors(layer: Any) -> Iterator[tuple[str, Tensor]]:
    """Tensors of the module below a wrapper of one parameter, without that parameter, such as biases of the experts."""
    tensors = layer.get_base_layer().state_dict()
    return ((name, tensor) for name, tensor in tensors.items() if name != layer.parameter_name)
