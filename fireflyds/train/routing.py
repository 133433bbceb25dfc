"""Losses of the routers of a mixture of experts, and the load of its experts, of one optimizer step."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fireflyds.config import ObjectiveConfig
from fireflyds.errors import UserError
from fireflyds.models.architecture import experts_used
from fireflyds.models.packed.routing import Routing, has_router_losses
from fireflyds.types import IGNORE_INDEX


def require_router_losses(config: ObjectiveConfig, hf_config: Any) -> None:
    """Raises `UserError` where losses of routers are wanted for an architecture that they are not defined for."""
    if config.has_router_losses and not has_router_losses(hf_config):
        has_experts = experts_used(hf_config.get_text_config()) is not None
        reason = "its routers balance the load otherwise" if has_experts else "it has no experts"
        raise _refusal(config, f"transformers has no load-balancing loss for {hf_config.model_type}: {reason}")


def _refusal(config: ObjectiveConfig, reason: str) -> UserError:
    name = "router_aux_loss" if config.router_aux_loss else "router_z_loss"
    return UserError(
        reason, key=f"objective.{name}", value=getattr(config, name), remedy=f"Leave it out (objective.{name}=0)"
    )


def load_balancing_loss(logits: list[Tensor], weights: Tensor, top_k: int) -> Tensor:
    """E · sum over experts of f · P, over all layers together (Switch Transformer, equations 4 to 6).

    f: how often an expert is among the `top_k` of a token, P: its mean probability. `weights` `[T]`, of sum 1 over the
    tokens that count. The gradient goes through P.
    """
    num_experts = logits[0].shape[1]
    share, probability = logits[0].new_zeros(2, num_experts, dtype=torch.float32).unbind(0)
    for of_layer in logits:
        probabilities = of_layer.float().softmax(dim=-1)
        chosen = probabilities.detach().topk(top_k, dim=-1).indices
        share = share.index_add(0, chosen.reshape(-1), weights[:, None].expand_as(chosen).reshape(-1))
        probability = probability + weights @ probabilities
    return num_experts * (share @ probability) / len(logits) ** 2


def z_loss(logits: list[Tensor], weights: Tensor) -> Tensor:
    """Mean of the squared logsumexp of the router logits over layers and tokens with `weights` (ST-MoE, equation 5)."""
    squares = [weights @ of_layer.float().logsumexp(dim=-1).square() for of_layer in logits]
    return torch.stack(squares).mean()


@dataclass(slots=True)
class StepRouting:
    """The routing of one step. Without a router (`routing` is None) nothing is added and nothing is reported."""

    routing: Routing | None
    config: ObjectiveConfig
    _sums: Tensor | None = None
    """float64 `[2]`: the load-balancing loss and the z-loss, times the targets of each micro-batch, summed."""

    def __post_init__(self) -> None:
        routers, layers = (0, 1) if self.routing is None else (self.routing.routers, len(self.routing.layers))
        if self.config.has_router_losses and routers != layers:
            raise _refusal(self.config, "the model has no routers beside its experts")
        if self.routing is not None:
            self.routing.keeps_logits = self.config.has_router_losses

    def start_step(self) -> None:
        """Sets counts and sums to zero."""
        self._sums = None
        if self.routing is not None and self.routing.counts is not None:
            self.routing.counts.zero_()

    def with_router_losses(self, loss_sum: Tensor, labels: Tensor, num_learned: int, num_targets: int) -> Tensor:
        """Adds the losses of the routers, times their coefficients, to the loss sum of a micro-batch.

        They are means over its learned tokens, so they count as often as it has targets: divided by the targets of the
        step this is their mean over all micro-batches and ranks. `labels` `[T]`: -100 where a token is not learned.
        """
        if self.routing is None or not self.routing.logits:
            return loss_sum
        logits, self.routing.logits = self.routing.logits, []
        weights = (labels != IGNORE_INDEX).float() / max(num_learned, 1)
        losses = torch.stack([load_balancing_loss(logits, weights, self.routing.top_k), z_loss(logits, weights)])
        sums = losses.detach().double() * num_targets
        self._sums = sums if self._sums is None else self._sums + sums
        aux, z = losses.unbind(0)
        return loss_sum + num_targets * (self.config.router_aux_loss * aux + self.config.router_z_loss * z)

    def sums(self) -> Tensor | None:
        """What is summed over all ranks, float64 `[2 + L · E]`: losses and counts; None where nothing was recorded."""
        if self.routing is None or self.routing.counts is None:
            return None
        counts = self.routing.counts
        losses = counts.new_zeros(2) if self._sums is None else self._sums
        return torch.cat([losses, counts.flatten()])

    def metrics(self, sums: np.ndarray, num_targets: int) -> dict[str, float]:
        """The metrics of a step. `sums`: `sums()` over all ranks; empty where nothing was recorded.

        `expert_load/<layer>`: tokens of the expert with the most over the mean of all, 1 where the load is even.
        `experts_unused`: share of the experts, of all layers, without a token in this step.
        """
        if self.routing is None or not sums.size:
            return {}
        counts = sums[2:].reshape(len(self.routing.layers), -1)
        loads = counts.max(axis=1) / np.maximum(counts.mean(axis=1), 1e-9)
        metrics = {f"expert_load/{layer}": float(load) for layer, load in zip(self.routing.layers, loads, strict=True)}
        metrics["experts_unused"] = float((counts == 0).mean())
        if self.config.has_router_losses:
            metrics |= dict(zip(("router_aux_loss", "router_z_loss"), map(float, sums[:2] / num_targets), strict=True))
        return metrics
