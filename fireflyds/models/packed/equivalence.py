"""Compares a model's packed forward pass with transformers' own on single documents: loss, gradients, independence."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from fireflyds_kernels import dispatch
from torch import Tensor
from torch.nn.functional import cross_entropy

from fireflyds.models.packed.forward import attention_dispatch_key, fuse, hidden_states
from fireflyds.models.rope_scaling import check_max_positions
from fireflyds.types import PackedBatch

# Maximum relative differences due to rounding, by dtype: of the loss, and of all gradients together.
TOLERANCES = {torch.float32: (1e-5, 1e-3), torch.bfloat16: (1e-2, 5e-2), torch.float16: (2e-3, 2e-2)}


@dataclass(frozen=True, slots=True)
class ImplementationResult:
    """Result for one implementation of packed attention, measured with the whole model."""

    implementation: str
    loss: float
    """|packed - separate| / separate."""
    gradients: float
    """Relative difference of the gradients of all trainable parameters, in the Euclidean norm."""
    leakage: float
    """Largest absolute change in the hidden states of the other documents when one document is replaced."""
    proven: bool


def compare_implementations(
    model: Any, lengths: list[int], seed: int, *, packed: bool = True
) -> Iterator[ImplementationResult]:
    """Yields a result per implementation of packed attention that can run, the preferred one first. Fuses the model.

    `packed=False`: one result, of documents that run one after the other.

    Raises:
        UserError: the model cannot be fused, or documents are longer than its number of positions.
    """
    check_max_positions(model.config, "documents: the longest", max(lengths))
    device = model.get_input_embeddings().weight.device
    generator = torch.Generator().manual_seed(seed)
    vocab_size = model.config.get_text_config().vocab_size
    documents = [torch.randint(0, vocab_size, (length,), generator=generator).to(device) for length in lengths]
    reference_loss = sum(_separate_loss(model, ids) for ids in documents)
    # Kept on the host, since two sets of gradients may not fit on the device.
    reference_gradients = _take_gradients(model)
    fuse(model, packed=packed)
    batch = _packed(documents)
    replacement = torch.randint(0, vocab_size, (lengths[len(lengths) // 2],), generator=generator).to(device)
    changed_batch = _packed([replacement if i == len(lengths) // 2 else ids for i, ids in enumerate(documents)])
    is_unchanged = torch.ones(sum(lengths), dtype=torch.bool, device=device)
    is_unchanged[sum(lengths[: len(lengths) // 2]) : sum(lengths[: len(lengths) // 2 + 1])] = False
    for name in _implementations(model, device) if packed else ["not packed"]:
        with dispatch.force(packed_attention=name) if packed else nullcontext():
            loss = model(**batch)
            loss.backward()
            gradients = _distance(_take_gradients(model), reference_gradients)
            with torch.no_grad():
                before, after = (_hidden(model, inputs) for inputs in (batch, changed_batch))
            leakage = float((before - after)[0, is_unchanged].abs().max()) if len(lengths) > 1 else 0.0
        relative = abs(loss.item() - reference_loss) / max(abs(reference_loss), 1e-12)
        most_loss, most_gradients = TOLERANCES[before.dtype]
        proven = relative <= most_loss and gradients <= most_gradients and leakage == 0
        yield ImplementationResult(name, relative, gradients, leakage, proven)


def table(findings: list[ImplementationResult]) -> str:
    """Formats the results as a text table."""
    lines = ["attention      loss differs  gradients differ  leakage   result"]
    for finding in findings:
        result = "proven" if finding.proven else "NOT EQUAL"
        lines.append(
            f"{finding.implementation:<14} {finding.loss:>12.1e}  {finding.gradients:>16.1e}  "
            f"{finding.leakage:>7.1e}   {result}"
        )
    return "\n".join(lines)


def _separate_loss(model: Any, ids: Tensor) -> float:
    if len(ids) < 2:
        return 0.0
    loss = cross_entropy(model(ids[None], use_cache=False).logits[0, :-1].float(), ids[1:], reduction="sum")
    loss.backward()
    return float(loss.detach())


def _take_gradients(model: Any) -> dict[str, Tensor]:
    gradients = {name: p.grad.float().cpu() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return gradients


def _distance(gradients: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Relative Euclidean distance over all parameters; a gradient that exists on one side only is zero on the other."""
    zero = torch.zeros(())
    names = gradients.keys() | expected.keys()
    squared_error = sum(
        float((gradients.get(name, zero) - expected.get(name, zero)).double().square().sum()) for name in names
    )
    return (squared_error / max(sum(float(g.double().square().sum()) for g in expected.values()), 1e-30)) ** 0.5


def _packed(documents: list[Tensor]) -> dict[str, Any]:
    return PackedBatch.from_documents([ids.tolist() for ids in documents]).model_inputs(documents[0].device)


def _hidden(model: Any, batch: dict[str, Any]) -> Tensor:
    return hidden_states(
        model, **{name: batch[name] for name in ("input_ids", "position_ids", "cu_seqlens", "max_seqlen")}
    )


def _implementations(model: Any, device: torch.device) -> list[str]:
    """Implementations of packed attention that support this model, according to its configuration."""
    key = attention_dispatch_key(model.config, device, model.get_input_embeddings().weight.dtype)
    return dispatch.runnable("packed_attention", key)
