"""Combinations of optimizer, ZeRO stage, offloading, precision and tuning that cannot work."""

from fireflyds.config import ModelInit, Offload, Precision, TrainConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.optim.optimizers import load_optimizer_spec


def check_compatibility(config: TrainConfig, precision: Precision) -> list[str]:
    """Refuse what a ZeRO stage or offloading does not support, before anything is loaded. Returns notes for people.

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
    quantised = tuning.method is TuningMethod.qlora
    if quantised and config.model.init is ModelInit.scratch:
        raise UserError(
            "with model.init=scratch there are no weights to quantise",
            key="tuning",
            value="qlora",
            remedy="Use tuning=full for a model from scratch",
        )
    if quantised and tuning.bits == 8 and zero.stage == 3:
        raise UserError(
            "8-bit weights gathered from the shards of zero.stage=3 give wrong losses",
            key="tuning.bits",
            value=8,
            remedy="Use zero=2, or tuning.bits=4",
        )
    if quantised and tuning.use_dora and (tuning.bits == 8 or zero.stage == 3):
        raise UserError(
            "PEFT's DoRA on a quantised base reads whole 4-bit weights, which a run with "
            f"tuning.bits={tuning.bits} and zero.stage={zero.stage} does not have",
            key="tuning.use_dora",
            value="true",
            remedy="Use tuning.bits=4 with zero=2",
        )
    if tuning.embeddings.name != "frozen" and tuning.head.name == "frozen":
        notes.append(
            "note: tuning.head=frozen while embeddings train: unless the head is tied, new tokens can be read but "
            "not written"
        )
    return notes


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
