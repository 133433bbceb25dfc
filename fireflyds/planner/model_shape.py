"""What memory and time depend on, read once from a model whose trainable parameters are marked, bare or real."""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from fireflyds.config import TrainConfig, TuningMethod
from fireflyds.metrics.flops import attention_windows, block_order, is_parallel
from fireflyds.optim import param_groups as groups
from fireflyds.optim.optimizers import load_optimizer_spec


@dataclass(frozen=True, slots=True)
class LinearShape:
    """A linear layer of a block; `r` is the rank of its adapter, 0: none."""

    rank: int
    """Its place there: those of one number read the same tensor (`flops.block_order`), 3 reads attention's output and 6
    what the activation makes."""
    inputs: int
    outputs: int
    trains: bool
    quantised: bool
    r: int
    twice: bool
    """PEFT's DoRA computes the weight's product again behind its dropout, of a quantised one with the weight unpacked."""


@dataclass(frozen=True, slots=True)
class BlockShape:
    """One transformer block. `needs_gradient`: something in it or below trains, so it keeps its activations."""

    linears: tuple[LinearShape, ...]
    norms_train: bool
    needs_gradient: bool
    window: int | None
    """Tokens that attention sees at most; None: all before in the document."""


@dataclass(frozen=True, slots=True)
class ArchTraits:
    """How the blocks of a model compute, as far as it decides what they keep."""

    gated: bool
    parallel: bool
    """One input for attention and feed-forward layer (Falcon)."""
    norms: int
    """Of the width of the block."""
    layer_norm: bool
    """Rather than RMS norms."""
    head_norms: bool
    """Of every query and key head (Qwen3)."""
    turned_apart: bool
    """Queries, keys and values come of one product and are rotated: values keep all of that product."""


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Numbers of parameters and widths; bytes come from the number format and the placement."""

    hidden_size: int
    num_heads: int
    head_dim: int
    num_key_value_heads: int
    vocab_size: int
    form: ArchTraits
    blocks: tuple[BlockShape, ...]
    groups: tuple[tuple[tuple[int, ...], int], ...]
    """Of every optimizer group the sizes of its parameters in order, and the bytes of state for one number."""
    frozen: int
    quantised_bytes: float
    largest: int
    """The largest trained tensor."""
    head_trained: int
    adapters: int
    """Trained parameters that are written beside a checkpoint: those of a run that does not train the whole body."""

    @property
    def trained(self) -> int:
        return sum(sum(sizes) for sizes, _ in self.groups)

    @property
    def state_bytes(self) -> int:
        """Of the optimizer, over all ranks."""
        return sum(sum(sizes) * each for sizes, each in self.groups)


def model_shape(model: Any, config: TrainConfig) -> ModelShape:
    """Read a model; under ZeRO-3 before the engine is built, which takes the parameters' shapes away."""
    hf_config = model.config
    heads = hf_config.num_attention_heads
    head = model.get_output_embeddings()
    packed = _packed_weights(model, config)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    quantised = sum(groups.logical_numel(p) for p in frozen if id(p) in packed)
    own = config.tuning.method is TuningMethod.full
    return ModelShape(
        hidden_size=hf_config.hidden_size,
        num_heads=heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        num_key_value_heads=_key_value_heads(hf_config),
        vocab_size=hf_config.vocab_size,
        form=_form(model),
        blocks=_blocks(model, packed, config),
        groups=tuple(
            (tuple(p.numel() for p in group.parameters), load_optimizer_spec(config.optim.name).state_bytes_of(group))
            for group in groups.parameter_groups(model, config)
        ),
        frozen=sum(groups.logical_numel(p) for p in frozen) - quantised,
        quantised_bytes=quantised * groups.QUANTISED_BYTES[config.tuning.bits],
        largest=max(p.numel() for p in trained),
        head_trained=sum(p.numel() for p in head.parameters() if p.requires_grad and p.dim() == 2),
        adapters=0 if own else sum(p.numel() for p in trained),
    )


def _packed_weights(model: Any, config: TrainConfig) -> set[int]:
    """Weights that are quantised, or will be where the model is a bare one."""
    head = model.get_output_embeddings()
    if config.tuning.method is not TuningMethod.qlora:
        return set()
    return {
        id(module.weight)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head and ".lora_" not in name
    }


def _key_value_heads(hf_config: Any) -> int:
    if getattr(hf_config, "multi_query", False) and not getattr(hf_config, "new_decoder_architecture", False):
        return 1
    found = getattr(hf_config, "num_key_value_heads", None) or getattr(hf_config, "num_kv_heads", None)
    return int(found or hf_config.num_attention_heads)


def _form(model: Any) -> ArchTraits:
    """Read of the first block."""
    inside = {name.partition(".0.")[2]: module for name, module in model.named_modules() if ".0." in name}
    norms = {name: module for name, module in inside.items() if "norm" in type(module).__name__.lower()}
    of_heads = [name for name in norms if name.endswith(("q_norm", "k_norm"))]
    rotary = model.config.model_type != "bloom" and not getattr(model.config, "alibi", False)
    return ArchTraits(
        gated=any(name.endswith("gate_proj") for name in inside),
        parallel=is_parallel(model.config),
        norms=len(norms) - len(of_heads),
        layer_norm=any(isinstance(module, nn.LayerNorm) for module in norms.values()),
        head_norms=bool(of_heads),
        turned_apart=rotary and any(name.endswith("query_key_value") for name in inside),
    )


def _inputs_order(model: Any) -> dict[str, int]:
    """`flops.block_order`, but parallel blocks' feed-forward layers have inputs of their own: behind the activation, and
    in front of it where there is a second norm."""
    own = {"dense_4h_to_h": 6} | ({"dense_h_to_4h": 5} if _form(model).norms > 1 else {})
    return block_order(model.config) | own


def _blocks(model: Any, packed: set[int], config: TrainConfig) -> tuple[BlockShape, ...]:
    order, sliding = _inputs_order(model), attention_windows(model.config)
    linears: list[list[LinearShape]] = [[] for _ in sliding]
    trained, norms = [False for _ in sliding], [False for _ in sliding]
    twice = config.tuning.has_adapters and config.tuning.use_dora and config.tuning.dropout > 0
    below = False
    for name, parameter in model.named_parameters():
        found = re.search(r"\.(\d+)\.", name)
        if found is None:
            below = below or (parameter.requires_grad and _is_embedding(model, parameter))
            continue
        layer = int(found[1])
        trained[layer] |= parameter.requires_grad
        norms[layer] |= parameter.requires_grad and parameter.dim() == 1 and "norm" in name
    for name, module in model.named_modules():
        found = re.search(r"\.(\d+)\.", name)
        if found is None or not isinstance(module, nn.Linear) or ".lora_" in name:
            continue
        owner = model.get_submodule(name.removesuffix(".base_layer"))
        adapter = next(iter(owner.lora_A.values())) if hasattr(owner, "lora_A") else None
        rank = next((order[part] for part in name[found.end() :].split(".") if part in order), 1)
        linears[int(found[1])].append(
            LinearShape(rank, module.in_features, module.out_features, module.weight.requires_grad, id(module.weight) in packed,
                   0 if adapter is None else adapter.out_features, adapter is not None and twice)
        )  # fmt: skip
    blocks = []
    for layer, window in enumerate(sliding):
        below = below or trained[layer]
        blocks.append(BlockShape(tuple(linears[layer]), norms[layer], below, window))
    return tuple(blocks)


def _is_embedding(model: Any, parameter: Any) -> bool:
    return any(parameter is each for each in model.get_input_embeddings().parameters())
