"""Muon for the matrices of the body (momentum 0.95), AdamW for the rest."""

from collections.abc import Sequence

import torch
from fireflyds_kernels.requirements import import_problem, triton_build_problem

from fireflyds.config import TrainConfig
from fireflyds.errors import UserError
from fireflyds.optim.optimizers import OptimizerSpec, ParamGroup


def check(config: TrainConfig) -> list[str]:
    """Returns notes on the configuration.

    Raises:
        UserError: adapters are trained, so that Muon has no matrix to train; a GPU for which nothing can be compiled.
    """
    if config.tuning.has_adapters:
        raise UserError(
            f"with tuning={config.tuning.method.name} no matrix of the body trains, so Muon would train nothing",
            key="optim",
            value="muon",
            remedy="Use optim=adamw, or tuning=full",
        )
    if torch.cuda.is_available() and (problem := import_problem("triton", "jit") or triton_build_problem()):
        raise UserError(
            f"DeepSpeed compiles its Muon with torch.compile, which cannot run on this GPU: {problem}",
            key="optim",
            value="muon",
            remedy="Install what it names, or use optim=adamw",
        )
    if not config.optim.max_grad_norm:
        return []
    return [
        "note: optim=muon: gradients would be clipped behind Muon's orthogonalisation, so "
        f"optim.max_grad_norm={config.optim.max_grad_norm:g} is taken as 0"
    ]


def build(groups: Sequence[ParamGroup], config: TrainConfig) -> torch.optim.Optimizer:
    """Muon of DeepSpeed for matrices of the body, with momentum 0.95; AdamW for the other weights."""
    from deepspeed.runtime.zero.muon.muon_optimizer import MuonWithAuxAdam

    adam = {"betas": (config.optim.betas[0], config.optim.betas[1]), "eps": config.optim.eps}
    settings = []
    for group in groups:
        settings.append(
            group.settings() | {"use_muon": group.as_matrices} | ({"momentum": 0.95} if group.as_matrices else adam)
        )
        for parameter in group.parameters:
            parameter.use_muon = group.as_matrices  # type: ignore[attr-defined]
    optimizer: torch.optim.Optimizer = MuonWithAuxAdam(settings)
    return optimizer


OPTIMIZER = OptimizerSpec(
    build,
    state_bytes=8,
    matrix_state_bytes=4,
    check=check,
    clips=False,
    # Muon needs whole gradients of matrices.
    zero_optimization={"reduce_scatter": False},
    compiles=True,
)
