"""Combinations of optimizer, ZeRO stage, offloading, precision and tuning that cannot work."""

from collections.abc import Sequence

from fireflyds.config import ModelInit, Offload, Precision, TrainConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.optim.optimizers import load_optimizer_spec


def check_compatibility(config: TrainConfig, precision: Precision, capability: int = 0) -> list[str]:
    """Refuse what a ZeRO stage or offloading does not support, before anything is loaded. Returns notes for people.

    `capability`: the compute capability of the GPU, 70 for sm_70; 0 where it is not known.

    Raises:
        UserError: a combination that cannot work; the message names the nearest that does.
    """
    optim, zero, tuning = config.optim, config.zero, config.tuning
    notes = load_optimizer_spec(optim.name).check(config)
    if precision is Precision.fp16 and zero.stage == 0:
        raise UserError(
            "DeepSpeed scales no loss with zero.stage=0, so small gradients would vanish",
            key="hardware.precision",
            value="fp16",
            remedy="Use zero=1, which is the same on one GPU",
        )
    if tuning.method is TuningMethod.qlora:
        _check_quantised(config, capability)
    if tuning.embeddings.name != "frozen" and tuning.head.name == "frozen":
        notes.append(
            "note: tuning.head=frozen while embeddings train: unless the head is tied, new tokens can be read but "
            "not written"
        )
    return notes


def _check_quantised(config: TrainConfig, capability: int) -> None:
    """Refuses what a quantised base does not support."""
    zero, tuning = config.zero, config.tuning
    if config.model.init is ModelInit.scratch:
        raise UserError(
            "with model.init=scratch there are no weights to quantise",
            key="tuning",
            value="qlora",
            remedy="Use tuning=full for a model from scratch",
        )
    if tuning.bits == 8 and 0 < capability < 75:
        raise UserError(
            f"LLM.int8 needs a GPU of sm_75 or newer; this one is sm_{capability}",
            key="tuning.bits",
            value=8,
            remedy="Use tuning.bits=4",
        )
    if tuning.bits == 8 and zero.stage == 3:
        raise UserError(
            "8-bit weights gathered from the shards of zero.stage=3 give wrong losses",
            key="tuning.bits",
            value=8,
            remedy="Use zero=2, or tuning.bits=4",
        )
    if tuning.use_dora and (tuning.bits == 8 or zero.stage == 3):
        raise UserError(
            "PEFT's DoRA on a quantised base reads whole 4-bit weights, which a run with "
            f"tuning.bits={tuning.bits} and zero.stage={zero.stage} does not have",
            key="tuning.use_dora",
            value="true",
            remedy="Use tuning.bits=4 with zero=2",
        )


def refuse_large_tensors(
    config: TrainConfig, group_sizes: Sequence[Sequence[int]], stage: int, ranks: int, sub_group_size: int = 10**9
) -> None:
    """Refuses tensors that have more elements than the optimizer counts: it would update a part of them, and say
    nothing.

    Args:
        group_sizes: elements of every trainable parameter, by parameter group.
        stage: the ZeRO stage. At 1 and 2 a group is one flat tensor on every rank; at 3 it is cut into sub-groups.
        ranks: the number of ranks.
        sub_group_size: DeepSpeed's setting of that name, in elements of one rank.

    Raises:
        UserError: the message names the nearest settings that work.
    """
    limit = load_optimizer_spec(config.optim.name).max_elements
    if limit is None:
        return
    shares = {
        0: [size for sizes in group_sizes for size in sizes],
        3: [min(-(-sum(sizes) // ranks), sub_group_size) for sizes in group_sizes],
    }.get(stage, [-(-sum(sizes) // ranks) for sizes in group_sizes])
    largest = max(shares, default=0)
    if largest <= limit:
        return
    needed = -(-max(map(sum, group_sizes)) // limit)
    more = f", {needed} GPUs or more" if stage in (1, 2) else ""
    raise UserError(
        f"bitsandbytes counts the elements of a tensor in 31 bits, and at zero.stage={stage} on {ranks} ranks one has "
        f"{largest:,}: it would be updated in part",
        key="optim.name",
        value=config.optim.name,
        remedy=f"Use zero=3{more}, or optim=adamw",
    )


def refuse_offload(config: TrainConfig) -> list[str]:
    """Raises `UserError` where states that bitsandbytes keeps on the GPU were to be offloaded."""
    if config.zero.offload_optimizer is Offload.none:
        return []
    raise UserError(
        f"optim={config.optim.name} is of bitsandbytes, which keeps its states on the GPU",
        key="zero.offload_optimizer",
        value=config.zero.offload_optimizer.name,
        remedy="Use optim=adamw, which is DeepSpeed's CPU Adam there, or zero.offload_optimizer=none",
    )
