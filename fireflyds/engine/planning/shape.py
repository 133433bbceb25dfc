"""What memory and time depend on, read once from a model whose trainable parameters are marked, bare or real."""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from fireflyds.config import TrainConfig, TuningMethod
from fireflyds.engine import groups
from fireflyds.engine.planning.flops import block_order, windows


@dataclass(frozen=True, slots=True)
class Linear:
    """A linear layer of a block: `rank` is its place there (`flops.block_order`); `r` the rank of its adapter, 0: none."""

    rank: int
    inputs: int
    outputs: int
    trains: bool
    quantised: bool
    r: int


@dataclass(frozen=True, slots=True)
class Block:
    """One transformer block. `needs_gradient`: something in it or below trains, so it keeps its activations."""

    linears: tuple[Linear, ...]
    norms_train: bool
    needs_gradient: bool
    trained: int
    """Parameters that train."""
    parameters: int


@dataclass(frozen=True, slots=True)
class Shape:
    """Numbers of parameters and widths; bytes come from the number format and the placement."""

    hidden_size: int
    num_heads: int
    head_dim: int
    num_key_value_heads: int
    vocab_size: int
    gated: bool
    blocks: tuple[Block, ...]
    parameters: int
    """All of them; a quantised one counts what it stands for."""
    groups: tuple[tuple[tuple[int, ...], int], ...]
    """Of every optimizer group the sizes of its parameters in order, and the bytes of state for one number."""
    frozen: int
    quantised_bytes: float
    largest: int
    """The largest trained tensor."""
    largest_tensor: int
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


def shape_of(model: Any, config: TrainConfig) -> Shape:
    """Read a model; under ZeRO-3 before the engine is built, which takes the parameters' shapes away."""
    hf_config = model.config
    heads = hf_config.num_attention_heads
    head = model.get_output_embeddings()
    packed = _packed_weights(model, config)
    frozen = [p for p in model.parameters() if not p.requires_grad]
    trained = [p for p in model.parameters() if p.requires_grad]
    quantised = sum(groups.stands_for(p) for p in frozen if id(p) in packed)
    own = config.tuning.method is TuningMethod.full
    return Shape(
        hidden_size=hf_config.hidden_size,
        num_heads=heads,
        head_dim=getattr(hf_config, "head_dim", None) or hf_config.hidden_size // heads,
        num_key_value_heads=_key_value_heads(hf_config),
        vocab_size=hf_config.vocab_size,
        gated=any(name.endswith("gate_proj") for name, _ in model.named_modules()),
        blocks=_blocks(model, packed),
        parameters=sum(groups.stands_for(p) for p in model.parameters()),
        groups=tuple(
            (tuple(p.numel() for p in group.parameters), groups.state_bytes(group, config))
            for group in groups.parameter_groups(model, config)
        ),
        frozen=sum(groups.stands_for(p) for p in frozen) - quantised,
        quantised_bytes=quantised * groups.QUANTISED_BYTES[config.tuning.bits],
        largest=max(p.numel() for p in trained),
        largest_tensor=max(groups.stands_for(p) for p in model.parameters()),
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


def _blocks(model: Any, packed: set[int]) -> tuple[Block, ...]:
    order, number = block_order(model.config), len(windows(model.config))
    linears: list[list[Linear]] = [[] for _ in range(number)]
    trained, total, norms = [0] * number, [0] * number, [False] * number
    below = False
    for name, parameter in model.named_parameters():
        found = re.search(r"\.(\d+)\.", name)
        if found is None:
            below = below or (parameter.requires_grad and _is_embedding(model, parameter))
            continue
        layer = int(found[1])
        total[layer] += groups.stands_for(parameter)
        trained[layer] += parameter.numel() * parameter.requires_grad
        norms[layer] |= parameter.requires_grad and parameter.dim() == 1 and "norm" in name
    for name, module in model.named_modules():
        found = re.search(r"\.(\d+)\.", name)
        if found is None or not isinstance(module, nn.Linear) or ".lora_" in name:
            continue
        owner = model.get_submodule(name.removesuffix(".base_layer"))
        adapter = next(iter(owner.lora_A.values())) if hasattr(owner, "lora_A") else None
        rank = next((order[part] for part in name[found.end() :].split(".") if part in order), 1)
        linears[int(found[1])].append(
            Linear(rank, module.in_features, module.out_features, module.weight.requires_grad, id(module.weight) in packed,
                   0 if adapter is None else adapter.out_features)
        )  # fmt: skip
    blocks = []
    for layer in range(number):
        below = below or bool(trained[layer])
        blocks.append(Block(tuple(linears[layer]), norms[layer], below, trained[layer], total[layer]))
    return tuple(blocks)


def _is_embedding(model: Any, parameter: Any) -> bool:
    return any(parameter is each for each in model.get_input_embeddings().parameters())
