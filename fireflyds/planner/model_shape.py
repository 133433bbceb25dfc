"""Sizes that memory and time depend on, read from a model with `requires_grad` set, also on the meta device."""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from fireflyds.config import TrainConfig, TuningMethod
from fireflyds.models.architecture import (
    LINEAR,
    attention_windows,
    block_order,
    expert_parameters,
    experts_used,
    falcon_alibi_width,
    head_dim,
    is_parallel,
    key_value_heads,
    linear_size,
)
from fireflyds.models.expert_adapters import is_expert_adapter
from fireflyds.optim import param_groups
from fireflyds.optim.optimizers import load_optimizer_spec


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer of a block; `r` is the rank of its adapter, 0 without an adapter."""

    rank: int
    """Position of its input in the block (`flops.block_order`): layers of equal rank read the same tensor; 3 is the
    output of attention, 6 the output of the activation function."""
    inputs: int
    outputs: int
    trains: bool
    quantised: bool
    r: int
    twice: bool
    """True where PEFT's DoRA repeats the product after its dropout; a quantised weight is dequantised for it."""


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The experts of a block: `used` of `count` for every token, each gated, `inner` wide."""

    used: int
    count: int
    inner: int
    trains: bool
    """Their matrices, or adapters added to them, have gradients."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One transformer block. `needs_gradient`: it or an earlier block is trainable, so it saves activations."""

    linears: tuple[LinearShape, ...]
    norms_train: bool
    needs_gradient: bool
    window: int | None
    """Sliding window of attention in tokens; None: all previous tokens of the document."""
    experts: ExpertShape | None = None
    adapted_experts: int = 0
    """Elements of the experts' matrices that have adapters: a forward pass computes and saves W + BA."""


@dataclass(frozen=True, slots=True)
class ArchTraits:
    """Properties of the blocks of a model that determine which activations they save."""

    gated: bool
    parallel: bool
    """Attention and feed-forward layer read the same input (Falcon)."""
    norms: int
    """Number of norms of the hidden size per block."""
    layer_norm: bool
    """True for layer norms, False for RMS norms."""
    head_norms: bool
    """Query and key heads have norms (Qwen3)."""
    alibi_in_keys: int
    """Elements by which queries, keys and values are wider than a head, for every query head (Falcon with ALiBi)."""
    turned_apart: bool
    """One product computes queries, keys and values, queries and keys are rotated: values keep the whole product."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Parameter counts and widths of a model; bytes follow from number format and placement."""

    hidden_size: int
    num_heads: int
    head_dim: int
    num_key_value_heads: int
    vocab_size: int
    form: ArchTraits
    blocks: tuple[BlockShape, ...]
    groups: tuple[tuple[tuple[int, ...], int], ...]
    """Per optimizer group: elements of each parameter in order, and bytes of optimizer state per element."""
    frozen: int
    quantised_bytes: float
    largest: int
    """Elements of the largest trainable tensor."""
    head_trained: int

    @property
    def trained(self) -> int:
        """Number of trained weights."""
        return sum(sum(sizes) for sizes, _ in self.groups)

    @property
    def state_bytes(self) -> int:
        """Bytes of optimizer states over all ranks."""
        return sum(sum(sizes) * bytes_per_element for sizes, bytes_per_element in self.groups)


def model_shape(model: Any, config: TrainConfig) -> ModelShape:
    """Reads the sizes of a model. Call it before a ZeRO-3 engine is built, which removes the parameters' shapes."""
    hf_config = model.config.get_text_config()
    head = model.get_output_embeddings()
    quantised_ids = _quantised_weight_ids(model, config)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    quantised = sum(param_groups.logical_numel(p) for p in frozen if id(p) in quantised_ids)
    return ModelShape(
        hidden_size=hf_config.hidden_size,
        num_heads=hf_config.num_attention_heads,
        head_dim=head_dim(hf_config),
        num_key_value_heads=key_value_heads(hf_config),
        vocab_size=hf_config.vocab_size,
        form=_arch_traits(model),
        blocks=_blocks(model, quantised_ids, config),
        groups=tuple(
            (tuple(p.numel() for p in group.parameters), load_optimizer_spec(config.optim.name).state_bytes_of(group))
            for group in param_groups.parameter_groups(model, config)
        ),
        frozen=sum(param_groups.logical_numel(p) for p in frozen) - quantised,
        quantised_bytes=quantised * param_groups.QUANTISED_BYTES[config.tuning.bits],
        largest=max(p.numel() for p in trained),
        head_trained=sum(p.numel() for p in head.parameters() if p.requires_grad and p.dim() == 2),
    )


def _quantised_weight_ids(model: Any, config: TrainConfig) -> set[int]:
    """Ids (`id()`) of weights that are quantised, or will be when the weights are loaded."""
    head = model.get_output_embeddings()
    if config.tuning.method is not TuningMethod.qlora:
        return set()
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, LINEAR) and module is not head and ".lora_" not in name
    }


def _arch_traits(model: Any) -> ArchTraits:
    """Reads the properties of the first block."""
    modules = {name.partition(".0.")[2]: module for name, module in model.named_modules() if ".0." in name}
    norms = {name: module for name, module in modules.items() if "norm" in type(module).__name__.lower()}
    head_norms = [name for name in norms if name.endswith(("q_norm", "k_norm"))]
    hf_config = model.config.get_text_config()
    rotary = hf_config.model_type != "bloom" and not getattr(hf_config, "alibi", False)
    return ArchTraits(
        gated=any(name.endswith("gate_proj") for name in modules),
        parallel=is_parallel(hf_config),
        norms=len(norms) - len(head_norms),
        layer_norm=any(isinstance(module, nn.LayerNorm) for module in norms.values()),
        head_norms=bool(head_norms),
        alibi_in_keys=falcon_alibi_width(hf_config),
        turned_apart=rotary and any(name.endswith("query_key_value") for name in modules),
    )


def _input_order(model: Any) -> dict[str, int]:
    """`flops.block_order`, except that feed-forward layers of parallel blocks have separate inputs: after the
    activation function, and before it if there is a second norm."""
    overrides = {"dense_4h_to_h": 6} | ({"dense_h_to_4h": 5} if _arch_traits(model).norms > 1 else {})
    return block_order(model.config.get_text_config()) | overrides


def _blocks(model: Any, quantised_ids: set[int], config: TrainConfig) -> tuple[BlockShape, ...]:
    order, windows = _input_order(model), attention_windows(model.config.get_text_config())
    linears: list[list[LinearShape]] = [[] for _ in windows]
    trained, norms_train = [False for _ in windows], [False for _ in windows]
    repeats_product = config.tuning.has_adapters and config.tuning.use_dora and config.tuning.dropout > 0
    needs_gradient = False
    for name, parameter in model.named_parameters():
        match = re.search(r"\.(\d+)\.", name)
        if match is None:
            needs_gradient = needs_gradient or (parameter.requires_grad and _is_embedding(model, parameter))
            continue
        layer = int(match[1])
        trained[layer] |= parameter.requires_grad
        norms_train[layer] |= parameter.requires_grad and parameter.dim() == 1 and "norm" in name
    adapted = [0 for _ in windows]
    for name, module in model.named_modules():
        match = re.search(r"\.(\d+)\.", name)
        if match is not None and is_expert_adapter(module):
            adapted[int(match[1])] += module.get_param().numel()
        if match is None or not isinstance(module, LINEAR) or ".lora_" in name:
            continue
        owner = model.get_submodule(name.removesuffix(".base_layer"))
        adapter = next(iter(owner.lora_A.values())) if hasattr(owner, "lora_A") else None
        rank = next((order[part] for part in name[match.end() :].split(".") if part in order), 1)
        linears[int(match[1])].append(
            LinearShape(
                rank,
                *linear_size(module),
                module.weight.requires_grad,
                id(module.weight) in quantised_ids,
                0 if adapter is None else adapter.out_features,
                adapter is not None and repeats_product,
            )
        )
    blocks = []
    for layer, window in enumerate(windows):
        needs_gradient = needs_gradient or trained[layer]
        experts = _experts(model, layer, adapted[layer])
        norms = norms_train[layer]
        blocks.append(BlockShape(tuple(linears[layer]), norms, needs_gradient, window, experts, adapted[layer]))
    return tuple(blocks)


def _experts(model: Any, layer: int, adapted: int) -> ExpertShape | None:
    """The experts of one layer; the smaller of their matrices has the inner width."""
    used = experts_used(model.config.get_text_config())
    matrices = [p for name, p in expert_parameters(model) if re.search(rf"\.{layer}\.", name)]
    if used is None or not matrices:
        return None
    inner = min(p.numel() for p in matrices) // (used[1] * model.config.get_text_config().hidden_size)
    return ExpertShape(*used, inner, adapted > 0 or any(p.requires_grad for p in matrices))


def _is_embedding(model: Any, parameter: Any) -> bool:
    return any(parameter is embedding for embedding in model.get_input_embeddings().parameters())
