"""What one micro-batch keeps between forward and backward: by block, as our packed forward pass saves it, and the loss.

On a GPU the fused kernels keep their inputs and compute the rest again; the CPU's definitions keep what autograd keeps of
them (`fireflyds_kernels/*/reference.py`). Tested against what autograd really saves.
"""

from dataclasses import dataclass

from fireflyds.planner.model_shape import BlockShape, LinearShape, ModelShape

# As `fireflyds_kernels/linear_cross_entropy/chunked.py` has them: bytes of logits at once, whole batch and chunk.
_WHOLE = {"cpu": 1 << 28, "cuda": 1 << 29}
_CHUNK = {"cpu": 3 << 25, "cuda": 1 << 28}


@dataclass(frozen=True, slots=True)
class ForwardSpec:
    """How a micro-batch is computed. `fused_adapters`: our QLoRA layer; PEFT's own otherwise."""

    device: str
    wide: int
    """Bytes of a number."""
    half: bool
    """float16, whose head's gradient stays float32."""
    dropout: float
    fused_adapters: bool
    dora: bool
    checkpointing: bool


def block_bytes(block: BlockShape, shape: ModelShape, how: ForwardSpec) -> float:
    """Kept by a block for one token."""
    if not block.needs_gradient:
        return 0.0
    w = how.wide
    heads = shape.num_heads * shape.head_dim
    # Queries and output, keys and values, and the log-sum-exp of every row.
    pairs = heads + shape.num_key_value_heads * shape.head_dim
    attention = (3 if shape.form.turned_apart else 2) * w * pairs + 4 * shape.num_heads
    # Inputs that linear layers keep for their own gradients; those of one place share theirs, attention's output is kept
    # by attention already.
    inputs: dict[int, int] = {}
    adapters = 0.0
    for linear in block.linears:
        shares = linear.r and (how.fused_adapters or not how.dropout)
        if (linear.trains or shares) and linear.rank != 3:
            inputs[linear.rank] = linear.inputs
        adapters += _adapter(linear, how)
    return attention + _norms(block, shape, how) + _gate(block, shape, how) + w * sum(inputs.values()) + adapters


def _norms(block: BlockShape, shape: ModelShape, how: ForwardSpec) -> float:
    """Each keeps its row and its scale; those of a parallel block read the same row. Layer norms have a mean beside it."""
    form, d = shape.form, shape.hidden_size
    rows = 1 if form.parallel else form.norms
    if form.layer_norm:
        return float(rows * how.wide * d + form.norms * 8)
    kept = rows * _normed(block, d, how)
    if form.head_norms:
        kept += (shape.num_heads + shape.num_key_value_heads) * _normed(block, shape.head_dim, how)
    return kept


def _normed(block: BlockShape, width: int, how: ForwardSpec) -> float:
    """Of an RMS norm: the row, float32 on the CPU, and there the normed row too where its weight trains."""
    each = how.wide if how.device == "cuda" else 4 + how.wide * block.norms_train
    return float(width * each + 4)


def _gate(block: BlockShape, shape: ModelShape, how: ForwardSpec) -> float:
    """Gate and up, and on the CPU silu of the gate; without a gate what the activation reads."""
    hidden = max(block.linears, key=lambda linear: linear.rank).inputs
    if not shape.form.gated:
        return float(how.wide * hidden)
    return float(how.wide * hidden * (2 if how.device == "cuda" else 3))


def _adapter(linear: LinearShape, how: ForwardSpec) -> float:
    if not linear.r:
        return 0.0
    kept = float(how.wide * linear.r)
    if how.dropout:
        # Ours keeps which were kept, PEFT's what was left of the input too; the CPU's dropout keeps factors.
        mask = 1 if how.fused_adapters or how.device == "cuda" else how.wide
        kept += linear.inputs * (mask if how.fused_adapters else mask + how.wide)
    if how.dora:
        kept += 2 * how.wide * linear.outputs
    return kept


def weight_bytes(block: BlockShape, how: ForwardSpec) -> float:
    """Unpacked weights that a block keeps, whatever the tokens: autograd keeps those of PEFT's second product."""
    kept = sum(each.inputs * each.outputs for each in block.linears if each.twice and each.quantised)
    return float(how.wide * kept * block.needs_gradient)


def boundary_bytes(block: BlockShape, shape: ModelShape, how: ForwardSpec) -> float:
    """Kept by a block for one token where it is computed again: what goes into it."""
    return float(how.wide * shape.hidden_size) if block.needs_gradient else 0.0


def passing_bytes(shape: ModelShape, how: ForwardSpec) -> float:
    """For one token, gradients that exist side by side while a block goes backward: of the feed-forward layer's product,
    gate and up, or of its one input and output."""
    inner = max(max(linear.inputs, linear.outputs) for block in shape.blocks for linear in block.linears)
    return float(how.wide * (3 * inner + 2 * shape.hidden_size))


def unpacked_bytes(shape: ModelShape, how: ForwardSpec) -> float:
    """Quantised weights in the model's own format at once: a block's where it is computed again, which keeps them for
    its backward pass, and one elsewhere."""
    sizes = [
        [linear.inputs * linear.outputs for linear in block.linears if linear.quantised] or [0]
        for block in shape.blocks
    ]
    whole = how.checkpointing and how.fused_adapters
    return float(how.wide * max(sum(each) if whole else max(each) for each in sizes))


@dataclass(frozen=True, slots=True)
class LossBytes:
    """Bytes at the head: at the end of the forward pass, and when the backward pass has begun."""

    forming: float
    returning: float


def loss_bytes(shape: ModelShape, how: ForwardSpec, tokens: int, labelled: int) -> LossBytes:
    """The logits of one chunk beside the head's gradient, which is formed with them; later that gradient twice, as it
    is and times what comes from above. Hidden states: the last, its norm, the labelled ones, their gradient."""
    kind = 4 if how.half else how.wide
    logits = labelled * shape.vocab_size * how.wide
    chunks = 1 if logits <= _WHOLE[how.device] else -(-logits // _CHUNK[how.device])
    forming = shape.head_trained * (kind if chunks == 1 else 4)
    at_once = logits / chunks
    # Slopes of float16 are multiplied in float32 on the CPU.
    extra = at_once if how.half and how.device == "cpu" else 0
    hidden = tokens * shape.hidden_size * (how.wide + (how.wide if how.device == "cuda" else 4 + how.wide) + kind)
    rows = labelled * shape.hidden_size * (how.wide + kind)
    return LossBytes(at_once + extra + forming + hidden + rows, 2 * shape.head_trained * kind + hidden)
