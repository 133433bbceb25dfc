"""Routing of a mixture of experts during the packed forward pass: router logits, and how often experts were chosen."""

import importlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fireflyds.models.architecture import expert_parameters, experts_used
from fireflyds.models.expert_adapters import plain_name

# Names of the module beside the experts that scores them.
_ROUTERS = ("gate", "router")


@dataclass(slots=True, eq=False)
class Routing:
    """What the routers of one fused model decide while it trains; the second pass of gradient checkpointing is not part
    of it.

    `layers`: numbers of the layers with experts; `routers`: how many of them have a router that is watched.
    `counts`, float64 `[L, E]`: how often every expert of every layer was chosen, until the owner sets it to zero; it is
    created on the device of the first forward pass. `logits`: those of the last forward pass by layer, `[T, E]`, with
    their graph; collected where `keeps_logits` is set.
    """

    layers: list[int]
    num_experts: int
    top_k: int
    routers: int = 0
    keeps_logits: bool = False
    logits: list[Tensor] = field(default_factory=list)
    counts: Tensor | None = None
    _recording: bool = False

    @contextmanager
    def recorded(self) -> Iterator[None]:
        """Context of a forward pass that is recorded. The backward pass, which may repeat layers, is outside of it."""
        self.logits, self._recording = [], True
        try:
            yield
        finally:
            self._recording = False

    def add_logits(self, router: nn.Module, inputs: Any, output: Any) -> None:
        """Forward hook of a router: keeps the output that has a score for every expert, before any normalisation."""
        if not (self._recording and self.keeps_logits):
            return
        outputs = output if isinstance(output, tuple) else (output,)
        scores = (t for t in outputs if t.is_floating_point() and t.shape[-1] == self.num_experts)
        self.logits.append(next(scores).reshape(-1, self.num_experts))

    @torch.no_grad()
    def add_choices(self, row: int, experts: nn.Module, inputs: Any, options: dict[str, Any]) -> None:
        """Hook before the experts of layer `row`, among whose inputs are the chosen experts of every token."""
        chosen = next((t for t in (*inputs, *options.values()) if _is_index(t)), None)
        if not self._recording or chosen is None:
            return
        if self.counts is None:
            shape = (len(self.layers), self.num_experts)
            self.counts = torch.zeros(shape, dtype=torch.float64, device=chosen.device)
        flat = chosen.reshape(-1)
        # Not bincount: it waits for the device.
        self.counts[row].index_add_(0, flat, torch.ones_like(flat, dtype=torch.float64))


def _is_index(value: Any) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point()


def watch_routing(model: Any) -> Routing | None:
    """Adds the hooks that record the routing of a model; None for a model without experts."""
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name, _ in expert_parameters(model)))
    if not owners:
        return None
    top_k, num_experts = experts_used(model.config.get_text_config()) or (0, 0)
    routing = Routing([_layer_of(name) for name in owners], num_experts, top_k)
    for row, name in enumerate(owners):
        model.get_submodule(name).register_forward_pre_hook(partial(routing.add_choices, row), with_kwargs=True)
        block = model.get_submodule(plain_name(f"{name}.").rstrip(".").rpartition(".")[0])
        router = next((getattr(block, part) for part in _ROUTERS if hasattr(block, part)), None)
        if router is not None:
            router.register_forward_hook(routing.add_logits)
            routing.routers += 1
    return routing


def _layer_of(name: str) -> int:
    match = re.search(r"\.(\d+)\.", f".{name}.")
    return int(match[1]) if match else 0


def has_router_losses(hf_config: Any) -> bool:
    """True for an architecture with experts for which transformers has the load-balancing loss of Switch Transformer:
    its routers choose by logits, while others balance the load by a bias."""
    hf_config = hf_config.get_text_config()
    if experts_used(hf_config) is None:
        return False
    modeling = importlib.import_module(type(hf_config).__module__.replace(".configuration_", ".modeling_"))
    return hasattr(modeling, "load_balancing_loss_func")
