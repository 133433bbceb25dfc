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
            "hardware.precision=fp16 with zero.stage=0: DeepSpeed scales no loss there, so small gradients would "
            "vanish",
            remedy="Nearest: zero=1, which is the same on one GPU",
        )
    quantised = tuning.method is TuningMethod.qlora
    if quantised and config.model.init is ModelInit.scratch:
        raise UserError(
            "tuning=qlora with model.init=scratch: there are no weights to quantise",
            remedy="Nearest: tuning=full for a model from scratch",
        )
    if quantised and tuning.bits == 8 and zero.stage == 3:
        raise UserError(
            "tuning.bits=8 with zero.stage=3: 8-bit weights gathered from shards give wrong losses",
            remedy="Nearest: zero=2, or tuning.bits=4",
        )
    if quantised and tuning.use_dora and (tuning.bits == 8 or zero.stage == 3):
        raise UserError(
            f"tuning.use_dora=true with tuning.bits={tuning.bits}, zero.stage={zero.stage}: PEFT's DoRA on a "
            "quantised base reads whole 4-bit weights",
            remedy="Nearest: tuning.bits=4 with zero=2",
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
        f"optim={config.optim.name} with zero.offload_optimizer={config.zero.offload_optimizer.name}: bitsandbytes "
        "keeps its states on the GPU",
        remedy="Nearest: optim=adamw, which is DeepSpeed's CPU Adam there; or zero.offload_optimizer=none",
    )
