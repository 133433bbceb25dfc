"""The optimizer of a run, and what DeepSpeed must be told because of it."""

from typing import Any

import torch

from fireflyds.config import ModelInit, Offload, OptimConfig, Optimizer, Precision, TrainConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.optim.param_groups import ParamGroup


def check_optimizer(config: TrainConfig, precision: Precision) -> list[str]:
    """Refuse what a ZeRO stage or offloading does not support, before anything is loaded. Returns notes for people.

    Raises:
        UserError: a combination that cannot work; the message names the nearest that does.
    """
    optim, zero, tuning = config.optim, config.zero, config.tuning
    offload = zero.offload_optimizer is not Offload.none
    if offload and optim.name in (Optimizer.paged_adamw_32bit, Optimizer.adamw_8bit):
        raise UserError(
            f"optim={optim.name.name} with zero.offload_optimizer={zero.offload_optimizer.name}: bitsandbytes keeps its states "
            "on the GPU. Nearest: optim=adamw, which is DeepSpeed's CPU Adam there; or zero.offload_optimizer=none"
        )
    if optim.name is Optimizer.muon and tuning.has_adapters:
        raise UserError(
            f"optim=muon with tuning={tuning.method.name}: no matrix of the body trains, so Muon would train nothing. Nearest: "
            "optim=adamw, or tuning=full"
        )
    if precision is Precision.fp16 and zero.stage == 0:
        raise UserError(
            "hardware.precision=fp16 with zero.stage=0: DeepSpeed scales no loss there, so small gradients would vanish. "
            "Nearest: zero=1, which is the same on one GPU"
        )
    quantised = tuning.method is TuningMethod.qlora
    if quantised and config.model.init is ModelInit.scratch:
        raise UserError(
            "tuning=qlora with model.init=scratch: there are no weights to quantise. Nearest: tuning=full for a model from scratch"
        )
    if quantised and tuning.bits == 8 and zero.stage == 3:
        raise UserError(
            "tuning.bits=8 with zero.stage=3: 8-bit weights gathered from shards give wrong losses. Nearest: zero=2, or "
            "tuning.bits=4"
        )
    if quantised and tuning.use_dora and (tuning.bits == 8 or zero.stage == 3):
        raise UserError(
            f"tuning.use_dora=true with tuning.bits={tuning.bits}, zero.stage={zero.stage}: PEFT's DoRA on a quantised base reads "
            "whole 4-bit weights. Nearest: tuning.bits=4 with zero=2"
        )
    notes = []
    if optim.name is Optimizer.muon and optim.max_grad_norm:
        notes.append(
            f"note: optim=muon: gradients would be clipped behind Muon's orthogonalisation, so optim.max_grad_norm={optim.max_grad_norm:g} "
            "is taken as 0"
        )
    if tuning.embeddings.name != "frozen" and tuning.head.name == "frozen":
        notes.append(
            "note: tuning.head=frozen while embeddings train: unless the head is tied, new tokens can be read but not written"
        )
    return notes


def gradient_clipping(config: OptimConfig) -> float:
    """The norm that DeepSpeed clips to; always said, since its silence means 1."""
    return 0.0 if config.name is Optimizer.muon else config.max_grad_norm


def build_optimizer(groups: list[ParamGroup], config: TrainConfig) -> torch.optim.Optimizer:
    """The optimizer over the groups; each keeps its peak as `initial_lr`.

    Raises:
        UserError: DeepSpeed's CPU Adam cannot be built here.
    """
    optim = config.optim
    betas = (optim.betas[0], optim.betas[1])
    settings: list[dict[str, Any]] = [
        {"params": group.parameters, "lr": group.lr, "initial_lr": group.lr, "weight_decay": group.weight_decay}
        for group in groups
    ]
    if optim.name is Optimizer.muon:
        return _muon(groups, settings, betas, optim.eps)
    if optim.name is Optimizer.adamw and config.zero.offload_optimizer is not Offload.none:
        return _cpu_adam(settings, betas, optim.eps)
    if optim.name is Optimizer.adamw:
        return torch.optim.AdamW(settings, betas=betas, eps=optim.eps, fused=torch.cuda.is_available())
    import bitsandbytes.optim

    kind = {Optimizer.paged_adamw_32bit: "PagedAdamW32bit", Optimizer.adamw_8bit: "AdamW8bit"}[optim.name]
    made: torch.optim.Optimizer = getattr(bitsandbytes.optim, kind)(settings, betas=betas, eps=optim.eps)
    return made


def reset_step_counts(optimizer: torch.optim.Optimizer) -> None:
    """Count steps from 0 again. Moments stay: after a step with zero gradients they are zero."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"] = torch.zeros_like(state["step"]) if isinstance(state["step"], torch.Tensor) else 0


def _muon(
    groups: list[ParamGroup], settings: list[dict[str, Any]], betas: tuple[float, float], eps: float
) -> torch.optim.Optimizer:
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    for group, setting in zip(groups, settings, strict=True):
        setting |= {"use_muon": group.use_muon} | (
            {"momentum": 0.95} if group.use_muon else {"betas": betas, "eps": eps}
        )
        for parameter in group.parameters:
            parameter.use_muon = group.use_muon  # type: ignore[attr-defined]
    made: torch.optim.Optimizer = MuonWithAuxAdam(settings)
    return made


def _cpu_adam(settings: list[dict[str, Any]], betas: tuple[float, float], eps: float) -> torch.optim.Optimizer:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    try:
        made: torch.optim.Optimizer = DeepSpeedCPUAdam(settings, betas=betas, eps=eps)
    except RuntimeError as error:
        raise UserError(
            f"zero.offload_optimizer=cpu: DeepSpeed's CPU Adam cannot be built here ({error.__cause__ or error}). Install "
            "ninja and a C++ compiler, or use zero.offload_optimizer=none"
        ) from error
    return made
