"""FLOPs of a training step of the packed model, and what a device could do at most: the two sides of MFU.

Counted are matrix products alone, two for a multiply and an add (Kaplan et al., arXiv 2001.08361): forward, and in the
backward pass those whose result somebody needs. Recomputation is left out, as MFU has it (PaLM, arXiv 2204.02311).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from fireflyds.config import Precision

# Where in its block a module computes; those of one number do so side by side. Norms stand before what reads them.
_ORDER = {
    "input_layernorm": 0, "ln_attn": 0, "ln_mlp": 0,
    "q_proj": 1, "k_proj": 1, "v_proj": 1, "q_norm": 1, "k_norm": 1, "query_key_value": 1,
    "o_proj": 3, "dense": 3, "post_attention_layernorm": 4,
    "gate_proj": 5, "up_proj": 5, "dense_h_to_4h": 5, "down_proj": 6, "dense_4h_to_h": 6,
}  # fmt: skip
# Falcon's blocks whose feed-forward layers read what attention reads.
_PARALLEL = {"dense_h_to_4h": 1, "dense_4h_to_h": 3}
_ATTENTION = 2
_EMBEDDINGS, _BEHIND = (-1, 0, 0), 1 << 30

Place = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class StepFlops:
    """What the parts of a step cost. A sum over tokens, labels and documents, so batches and ranks may be added up."""

    per_token: float
    """The body's matrices."""
    per_label: float
    """The head, over the rows that have a label."""
    per_pair: tuple[tuple[int | None, float], ...]
    """Attention, for each pair of a token and one it sees: the window of the layers, their cost."""

    def count(self, lengths: Any, labelled: int) -> float:
        """FLOPs forward and backward over documents of these lengths (`cu_seqlens.diff()`), `labelled` rows of them
        with a label."""
        lengths = np.asarray(lengths, dtype=np.int64)
        attention = sum(cost * visible_pairs(lengths, window) for window, cost in self.per_pair)
        return self.per_token * float(lengths.sum()) + self.per_label * labelled + attention


def visible_pairs(lengths: Any, window: int | None) -> float:
    """Pairs of a token and one it sees under a causal mask, itself included: n (n + 1) / 2 of a document of n, and at
    most `window` a token."""
    lengths = np.asarray(lengths, dtype=np.float64)
    beyond = np.maximum(lengths - (window or np.inf), 0)
    return float((lengths * (lengths + 1) - beyond * (beyond + 1)).sum() / 2)


def step_flops(model: Any) -> StepFlops:
    """The costs of a model whose trainable parameters are marked, also of a bare one. To be asked before the engine is
    built: ZeRO-3 takes the parameters' shapes away.

    A weight's gradient is computed where it trains, an input's down to the lowest trained parameter: with frozen
    embeddings the first block's queries, keys and values need none. Looking up embeddings, norms, gates and softmax
    are no matrix products.
    """
    places = dict(_places(model))
    head = model.get_output_embeddings()
    trained = [places[name] for name, parameter in model.named_parameters() if parameter.requires_grad]
    lowest = min(trained)
    per_token = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and module is not head:
            gradients = module.weight.requires_grad + (lowest < places[f"{name}.weight"])
            per_token += 2 * module.in_features * module.out_features * (1 + gradients)
    # Below the head there is always something that trains, or it trains alone.
    below = lowest < (_BEHIND, 1, 0)
    per_label = sum(2 * p.numel() * (1 + below + p.requires_grad) for p in head.parameters() if p.dim() == 2)
    return StepFlops(per_token, per_label, _attention(model.config, lowest))


def _attention(hf_config: Any, lowest: Place) -> tuple[tuple[int | None, float], ...]:
    """Scores and weighted sum forward; dV, dP, dQ and dK backward. Scores computed again there are recomputation."""
    heads = hf_config.num_attention_heads
    head_dim = getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads
    costs: dict[int | None, float] = {}
    for layer, window in enumerate(attention_windows(hf_config)):
        backward = 4 if lowest < (layer, _ATTENTION, 0) else 0
        costs[window] = costs.get(window, 0.0) + 2 * heads * head_dim * (2 + backward)
    return tuple(costs.items())


def attention_windows(hf_config: Any) -> list[int | None]:
    """The sliding window of every layer, None for whole documents."""
    window = getattr(hf_config, "sliding_window", None)
    kinds = getattr(hf_config, "layer_types", None)
    if kinds:
        return [window if kind == "sliding_attention" else None for kind in kinds]
    return [window] * int(hf_config.num_hidden_layers)


def is_parallel(hf_config: Any) -> bool:
    """Whether the feed-forward layer reads what attention reads (Falcon)."""
    return bool(getattr(hf_config, "parallel_attn", False) or getattr(hf_config, "new_decoder_architecture", False))


def block_order(hf_config: Any) -> dict[str, int]:
    """Names of modules of a block with when their inputs are there: 1 what attention reads, 3 its output, 5 what the
    feed-forward layer reads, 6 its output. In parallel blocks both sides have the same numbers."""
    return _ORDER | (_PARALLEL if is_parallel(hf_config) else {})


def _places(model: Any) -> Iterator[tuple[str, Place]]:
    """Parameters by name with where they come in the forward pass: block, module, base and A before B."""
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    order, in_blocks = block_order(model.config), False
    for name, parameter in model.named_parameters(remove_duplicate=False):
        block = re.search(r"\.(\d+)\.", name)
        in_blocks = in_blocks or block is not None
        if id(parameter) in embeddings:
            yield name, _EMBEDDINGS
        elif id(parameter) in head:
            yield name, (_BEHIND, 1, 0)
        elif block is None:
            yield name, (_BEHIND, 0, 0) if in_blocks else _EMBEDDINGS
        else:
            parts = name[block.end() :].split(".")
            rank = next((order[part] for part in parts if part in order), _ATTENTION)
            yield name, (int(block[1]), rank, int("lora_B" in parts))


# Published peaks of dense matrix products with 32-bit sums, TFLOP/s: float16, bfloat16 (0 where there is none) and
# float32 outside the tensor cores. From NVIDIA's data sheets; figures "with sparsity" are halved. The first name that is
# part of the device's own counts, so narrower names stand first.
_PEAKS: dict[str, tuple[float, float, float]] = {
    "V100S": (130, 0, 16.4), "V100-PCIE": (112, 0, 14), "V100": (125, 0, 15.7), "T4": (65, 0, 8.1),
    "A100": (312, 312, 19.5), "A800": (312, 312, 19.5), "A30": (165, 165, 10.3), "A40": (149.7, 149.7, 37.4),
    "A10": (125, 125, 31.2), "RTX A6000": (154.8, 154.8, 38.7), "L40S": (362, 362, 91.6), "L40": (181, 181, 90.5),
    "L4": (121, 121, 30.3), "RTX 3090": (71, 71, 35.6), "RTX 4090": (165.2, 165.2, 82.6), "RTX 5090": (209.5, 209.5, 104.8),
    "H100 PCIe": (756, 756, 51), "H100 NVL": (835, 835, 60), "H100": (989, 989, 67), "H800 PCIe": (756, 756, 51),
    "H800": (989, 989, 67), "H200 NVL": (835, 835, 60), "H200": (989, 989, 67), "GH200": (989, 989, 67), "H20": (148, 148, 44),
    "GB200": (2500, 2500, 80), "B200": (2250, 2250, 75), "B100": (1750, 1750, 60),
}  # fmt: skip


def known_gpus() -> list[str]:
    """Names whose peaks are known."""
    return sorted(_PEAKS)


def peak_flops(device_name: str, precision: Precision, peak_tflops: float | None) -> float | None:
    """FLOP/s of one device at most, `hardware.peak_tflops` before the table; None where neither knows, so that there is
    no MFU rather than a guessed one. `device_name` is what `torch.cuda.get_device_name` says."""
    if peak_tflops is not None:
        return peak_tflops * 1e12
    column = {Precision.fp16: 0, Precision.bf16: 1, Precision.fp32: 2}[precision]
    words = re.sub(r"[-_]+", " ", device_name).upper()
    for name, peaks in _PEAKS.items():
        if re.search(rf"\b{re.sub('-', ' ', name).upper()}\b", words):
            return peaks[column] * 1e12 or None
    return None
