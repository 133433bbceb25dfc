"""Activation memory of one micro-batch between forward and backward pass, of each packed block and of the loss.

On a GPU the fused kernels save their inputs and recompute the rest; the reference implementations on the CPU save what
autograd saves (`fireflyds_kernels/*/reference.py`). Tested against the tensors that autograd actually saves.
"""

from dataclasses import dataclass

from fireflyds.planner.model_shape import BlockShape, ExpertShape, LinearShape, ModelShape

# Same values as `fireflyds_kernels/linear_cross_entropy/chunked.py`: maximum bytes of logits unchunked, and per chunk.
_MAX_UNCHUNKED_BYTES = {"cpu": 1 << 28, "cuda": 1 << 29}
_MAX_CHUNK_BYTES = {"cpu": 3 << 25, "cuda": 1 << 28}


@dataclass(frozen=True, slots=True)
class ForwardSpec:
    """How a micro-batch is computed. `fused_adapters`: the fused QLoRA layer of fireflyds instead of PEFT's layers."""

    device: str
    wide: int
    """Bytes per element."""
    half: bool
    """True for float16, where the gradient of the head stays float32."""
    dropout: float
    fused_adapters: bool
    dora: bool
    checkpointing: bool


def block_bytes(block: BlockShape, shape: ModelShape, how: ForwardSpec) -> float:
    """Bytes per token that a block saves for its backward pass."""
    if not block.needs_gradient:
        return 0.0
    itemsize = how.wide
    wider = shape.form.alibi_in_keys
    key_heads = shape.num_heads if wider else shape.num_key_value_heads
    # Queries and output, keys and values, and the float32 log-sum-exp of every head.
    attention_width = (shape.num_heads + key_heads) * (shape.head_dim + wider)
    attention = (3 if shape.form.turned_apart else 2) * itemsize * attention_width + 4 * shape.num_heads
    # Inputs that linear layers save for weight gradients: layers of equal `rank` share one input, and the output of
    # attention (rank 3) is already saved by attention, unless it is cut out of a wider one.
    inputs: dict[int, int] = {}
    adapters = 0.0
    for linear in block.linears:
        shares_input = linear.r and (how.fused_adapters or not how.dropout)
        if (linear.trains or shares_input) and (linear.rank != 3 or wider):
            inputs[linear.rank] = linear.inputs
        adapters += _adapter_bytes(linear, how)
    return (
        attention
        + _norm_bytes(block, shape, how)
        + (_gate_bytes(block, shape, how) if block.experts is None else _expert_bytes(block.experts, shape, how))
        + itemsize * sum(inputs.values())
        + adapters
    )


def _norm_bytes(block: BlockShape, shape: ModelShape, how: ForwardSpec) -> float:
    """Bytes per token of all norms: input and scale, with the mean for layer norms; parallel blocks share one input."""
    form, hidden_size = shape.form, shape.hidden_size
    rows = 1 if form.parallel else form.norms
    if form.layer_norm:
        return float(rows * how.wide * hidden_size + form.norms * 8)
    saved = rows * _rms_norm_bytes(block, hidden_size, how)
    if form.head_norms:
        saved += (shape.num_heads + shape.num_key_value_heads) * _rms_norm_bytes(block, shape.head_dim, how)
    return saved


def _rms_norm_bytes(block: BlockShape, width: int, how: ForwardSpec) -> float:
    """Bytes per token of an RMS norm: input (CPU: float32, and the normalized input if its weight trains), scale."""
    itemsize = how.wide if how.device == "cuda" else 4 + how.wide * block.norms_train
    return float(width * itemsize + 4)


def _gate_bytes(block: BlockShape, shape: ModelShape, how: ForwardSpec) -> float:
    """Bytes per token of gate and up, on the CPU also silu(gate); without a gate, input of the activation function."""
    hidden = max(block.linears, key=lambda linear: linear.rank).inputs
    if not shape.form.gated:
        return float(how.wide * hidden)
    return float(how.wide * hidden * (2 if how.device == "cuda" else 3))


def _expert_bytes(experts: ExpertShape, shape: ModelShape, how: ForwardSpec) -> float:
    """Bytes per token of experts in transformers' `grouped_mm`: for every expert used gate and up, silu(gate) and its
    output; the inputs of both products, and of the router, where they train; its probabilities, and five indices."""
    of_each, of_router = 3 * experts.inner + shape.hidden_size, 0
    if experts.trains:
        of_each, of_router = of_each + experts.inner + shape.hidden_size, shape.hidden_size
    return float(how.wide * (experts.used * of_each + of_router) + 4 * experts.count + 40 * experts.used)


def _adapter_bytes(linear: LinearShape, how: ForwardSpec) -> float:
    if not linear.r:
        return 0.0
    saved = float(how.wide * linear.r)
    if how.dropout:
        # The fused layer saves the dropout mask, PEFT also the masked input; the CPU's mask has the dtype of the input.
        mask = 1 if how.fused_adapters or how.device == "cuda" else how.wide
        saved += linear.inputs * (mask if how.fused_adapters else mask + how.wide)
    if how.dora:
        saved += 2 * how.wide * linear.outputs
    return saved


def weight_bytes(block: BlockShape, how: ForwardSpec) -> float:
    """Bytes of weights that a block saves for any number of tokens: dequantised ones, of DoRA's second product, and
    those of experts with their adapters added."""
    numel = sum(linear.inputs * linear.outputs for linear in block.linears if linear.twice and linear.quantised)
    return float(how.wide * (numel + block.adapted_experts) * block.needs_gradient)


def boundary_bytes(block: BlockShape, shape: ModelShape, how: ForwardSpec) -> float:
    """Bytes per token that a block saves under gradient checkpointing: its input."""
    return float(how.wide * shape.hidden_size) if block.needs_gradient else 0.0


def passing_bytes(shape: ModelShape, how: ForwardSpec) -> float:
    """Bytes per token of gradients that exist at the same time in the backward pass of a block.

    These are of the feed-forward layer (product, gate and up; without a gate, input and output of the activation) and
    of two rows of the hidden size.
    """
    inner = max(max(linear.inputs, linear.outputs) for block in shape.blocks for linear in block.linears)
    return float(how.wide * (3 * inner + 2 * shape.hidden_size))


def unpacked_bytes(shape: ModelShape, how: ForwardSpec) -> float:
    """Peak bytes of dequantised weights: those of a whole block where it is recomputed, which saves them for its
    backward pass, else those of one layer. And of the gradients of experts with their adapters added."""
    block_numels = [
        [linear.inputs * linear.outputs for linear in block.linears if linear.quantised] or [0]
        for block in shape.blocks
    ]
    whole_block = how.checkpointing and how.fused_adapters
    experts = max(block.adapted_experts for block in shape.blocks)
    return float(how.wide * (experts + max(sum(numels) if whole_block else max(numels) for numels in block_numels)))


@dataclass(frozen=True, slots=True)
class LossBytes:
    """Bytes of the loss: at the end of the forward pass (`forming`), at the start of the backward (`returning`)."""

    forming: float
    returning: float


def loss_bytes(shape: ModelShape, how: ForwardSpec, tokens: int, labelled: int) -> LossBytes:
    """Forward: the logits of one chunk and the gradient of the head, which is computed with them. Backward: that
    gradient twice, before and after scaling by the gradient of the loss. Both: hidden states (the last ones, their norm
    and their gradient); forward also the labelled rows and their gradient."""
    gradient_itemsize = 4 if how.half else how.wide
    logits = labelled * shape.vocab_size * how.wide
    chunks = 1 if logits <= _MAX_UNCHUNKED_BYTES[how.device] else -(-logits // _MAX_CHUNK_BYTES[how.device])
    forming = shape.head_trained * (gradient_itemsize if chunks == 1 else 4)
    chunk_logits = logits / chunks
    # float16 gradients of the logits are multiplied in float32 on the CPU.
    extra = chunk_logits if how.half and how.device == "cpu" else 0
    hidden = (
        tokens
        * shape.hidden_size
        * (how.wide + (how.wide if how.device == "cuda" else 4 + how.wide) + gradient_itemsize)
    )
    rows = labelled * shape.hidden_size * (how.wide + gradient_itemsize)
    return LossBytes(
        chunk_logits + extra + forming + hidden + rows, 2 * shape.head_trained * gradient_itemsize + hidden
    )
