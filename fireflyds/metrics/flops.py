"""FLOPs of a training step of the packed model, and peak FLOP/s of devices: numerator and denominator of MFU.

Only matrix products are counted, a multiply-add as two FLOPs (Kaplan et al., arXiv 2001.08361): all of the
forward pass, and those of the backward pass whose gradient is needed. Recomputation is excluded, as in the definition
of MFU (PaLM, arXiv 2204.02311).
"""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from fireflyds.config import Precision
from fireflyds.models.architecture import (
    LINEAR,
    attention_windows,
    block_order,
    expert_parameters,
    experts_used,
    head_dim,
    layer_configs,
    linear_size,
)
from fireflyds.models.expert_adapters import is_expert_adapter

_ATTENTION = 2
_EMBEDDINGS, _AFTER_BLOCKS = (-1, 0, 0), 1 << 30

Place = tuple[int, int, int]
"""Position of a parameter in the forward pass: block, order within the block, and 1 for LoRA B (else 0)."""


@dataclass(frozen=True, slots=True)
class StepFlops:
    """FLOPs of the parts of a step. Additive over tokens, labels and documents, so batches and ranks can be summed."""

    per_token: float
    """All linear layers except the output head."""
    per_label: float
    """The output head, per row that has a label."""
    per_pair: tuple[tuple[int | None, float], ...]
    """Attention, per query-key pair: sliding window (None: whole documents), FLOPs of all layers with that window."""

    def count(self, lengths: Any, labelled: int) -> float:
        """FLOPs, forward and backward, of documents of `lengths` (`cu_seqlens.diff()`) with `labelled`
        labelled rows."""
        lengths = np.asarray(lengths, dtype=np.int64)
        attention = sum(cost * visible_pairs(lengths, window) for window, cost in self.per_pair)
        return self.per_token * float(lengths.sum()) + self.per_label * labelled + attention


def visible_pairs(lengths: Any, window: int | None) -> float:
    """Number of query-key pairs under a causal mask, including the diagonal: n (n + 1) / 2 for a document of n tokens,
    at most `window` per query."""
    lengths = np.asarray(lengths, dtype=np.float64)
    excess = np.maximum(lengths - (window or np.inf), 0)
    return float((lengths * (lengths + 1) - excess * (excess + 1)).sum() / 2)


def step_flops(model: Any) -> StepFlops:
    """Computes the FLOPs of a model whose trainable parameters have `requires_grad`; meta tensors suffice.

    Must be called before the engine is built: ZeRO-3 replaces parameters by empty tensors, so their shapes are lost.

    Weight gradients are counted for trainable weights, input gradients for all layers above the lowest trainable
    parameter: with frozen embeddings the query, key and value projections of the first block need no input gradient.
    Embedding lookups, norms, gates and softmax are not matrix products and are excluded. Of experts those count that a
    token is sent to.
    """
    positions = dict(_positions(model))
    head = model.get_output_embeddings()
    trainable = [positions[name] for name, parameter in model.named_parameters() if parameter.requires_grad]
    lowest = min(trainable)
    per_token = 0.0
    used, total = experts_used(model.config.get_text_config()) or (0, 1)
    of_experts = {id(part) for module in model.modules() if is_expert_adapter(module) for part in module.modules()}
    for name, module in model.named_modules():
        if isinstance(module, LINEAR) and module is not head:
            gradients = module.weight.requires_grad + (lowest < positions[f"{name}.weight"])
            share = used / total if id(module) in of_experts else 1
            per_token += 2 * math.prod(linear_size(module)) * (1 + gradients) * share
    for name, parameter in expert_parameters(model):
        gradients = parameter.requires_grad + (lowest < positions[name])
        per_token += 2 * parameter.numel() * used / total * (1 + gradients)
    # The head computes an input gradient unless it is the only trainable module.
    input_gradient = lowest < (_AFTER_BLOCKS, 1, 0)
    per_label = sum(2 * p.numel() * (1 + input_gradient + p.requires_grad) for p in head.parameters() if p.dim() == 2)
    return StepFlops(per_token, per_label, _attention_flops(model.config.get_text_config(), lowest))


def _attention_flops(hf_config: Any, lowest: Place) -> tuple[tuple[int | None, float], ...]:
    """FLOPs per query-key pair. Forward: scores, weighted sum; backward: dV, dP, dQ, dK, without recomputed scores."""
    widths = [hf_config.num_attention_heads * head_dim(layer) for layer in layer_configs(hf_config)]
    costs: dict[int | None, float] = {}
    for layer, window in enumerate(attention_windows(hf_config)):
        backward = 4 if lowest < (layer, _ATTENTION, 0) else 0
        costs[window] = costs.get(window, 0.0) + 2 * widths[layer if len(widths) > 1 else 0] * (2 + backward)
    return tuple(costs.items())


def _positions(model: Any) -> Iterator[tuple[str, Place]]:
    """Parameter names with their position in the forward pass: block, module, and LoRA B after A and base weights."""
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    order, in_blocks = block_order(model.config.get_text_config()), False
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block = re.search(r"\.(\d+)\.", name)
        in_blocks = in_blocks or block is not None
        if id(parameter) in embeddings:
            yield name, _EMBEDDINGS
        elif id(parameter) in head:
            yield name, (_AFTER_BLOCKS, 1, 0)
        elif block is None:
            yield name, (_AFTER_BLOCKS, 0, 0) if in_blocks else _EMBEDDINGS
        else:
            modules = name[block.end() :].split(".")
            stage = next((order[part] for part in modules if part in order), _ATTENTION)
            yield name, (int(block[1]), stage, int("lora_B" in modules))


# Published peak TFLOP/s of dense matrix products with 32-bit accumulation: float16, bfloat16 (0 where unsupported) and
# float32 without tensor cores. From NVIDIA's data sheets; figures "with sparsity" are halved. The first name that is
# contained in the device name is used, so more specific names come first.
_PEAKS: dict[str, tuple[float, float, float]] = {
    "V100S": (130, 0, 16.4), "V100-PCIE": (112, 0, 14), "V100": (125, 0, 15.7), "T4": (65, 0, 8.1),
    "A100": (312, 312, 19.5), "A800": (312, 312, 19.5), "A30": (165, 165, 10.3), "A40": (149.7, 149.7, 37.4),
    "A10": (125, 125, 31.2), "RTX A6000": (154.8, 154.8, 38.7), "L40S": (362, 362, 91.6), "L40": (181, 181, 90.5),
    "L4": (121, 121, 30.3), "RTX 3090": (71, 71, 35.6), "RTX 4090": (165.2, 165.2, 82.6),
    "RTX 5090": (209.5, 209.5, 104.8),
    "H100 PCIe": (756, 756, 51), "H100 NVL": (835, 835, 60), "H100": (989, 989, 67), "H800 PCIe": (756, 756, 51),
    "H800": (989, 989, 67), "H200 NVL": (835, 835, 60), "H200": (989, 989, 67), "GH200": (989, 989, 67),
    "H20": (148, 148, 44),
    "GB200": (2500, 2500, 80), "B200": (2250, 2250, 75), "B100": (1750, 1750, 60),
}  # fmt: skip


def known_gpus() -> list[str]:
    """Names of the GPUs in the table of peak FLOP/s, sorted."""
    return sorted(_PEAKS)


def peak_flops(device_name: str, precision: Precision, peak_tflops: float | None) -> float | None:
    """Peak FLOP/s of one device: `hardware.peak_tflops` if set, else the value of the table; None where neither is
    available, so that no estimated MFU is reported. `device_name`: the result of `torch.cuda.get_device_name`."""
    if peak_tflops is not None:
        return peak_tflops * 1e12
    column = {Precision.fp16: 0, Precision.bf16: 1, Precision.fp32: 2}[precision]
    words = re.sub(r"[-_]+", " ", device_name).upper()
    for name, peaks in _PEAKS.items():
        if re.search(rf"\b{re.sub('-', ' ', name).upper()}\b", words):
            return peaks[column] * 1e12 or None
    return None
