"""Kernels on the CPU, each compared with what it replaces: attention, the loss head, a training step.

    python benchmarks/bench_kernels.py            writes results/kernels_cpu<cores>_<yyyymm>.md

cut-cross-entropy is compared where it is installed, and named where it is not.
"""

import os
import sys
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path

import machine
import timing
import torch
from fireflyds_kernels import linear_cross_entropy, packed_attention
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

THREADS = 2
VOCAB, HIDDEN, TOKENS = 55_296, 512, 2048
DTYPES = (torch.float32, torch.bfloat16)
Implementations = dict[str, Callable[[], object]]


def lengths(count: int, total: int) -> list[int]:
    """`count` document lengths with a long tail that add up to `total`."""
    draws = torch.distributions.LogNormal(0.0, 0.75).icdf((torch.arange(count) + 0.5) / count)
    values = (draws / draws.sum() * total).int().clamp(min=8).tolist()
    values[-1] += total - sum(values)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return [values[i] for i in order]


def attention_implementations(documents: list[int], dtype: torch.dtype) -> Implementations:
    """Forward and backward, 8 heads of 64."""
    total, generator = sum(documents), torch.Generator().manual_seed(0)
    q, k, v, upstream = (torch.randn(total, 8, 64, generator=generator).to(dtype).requires_grad_() for _ in range(4))
    bounds = [0, *accumulate(documents)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    document = torch.repeat_interleave(torch.arange(len(documents)), torch.tensor(documents))
    mask = (document[:, None] == document[None]) & torch.ones(total, total, dtype=torch.bool).tril()
    additive = torch.zeros(total, total, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)

    def forward_and_backward(forward: Callable[[], Tensor]) -> None:
        forward().backward(upstream)
        q.grad = k.grad = v.grad = None

    def heads_first(x: Tensor) -> Tensor:
        return x.transpose(0, 1)[None]

    def dense() -> Tensor:
        return scaled_dot_product_attention(heads_first(q), heads_first(k), heads_first(v), attn_mask=mask)[
            0
        ].transpose(0, 1)

    def eager() -> Tensor:
        scores = heads_first(q) @ heads_first(k).transpose(-1, -2) * 64**-0.5 + additive
        return (scores.softmax(-1, dtype=torch.float32).to(dtype) @ heads_first(v))[0].transpose(0, 1)

    def slices() -> Tensor:
        parts = [
            scaled_dot_product_attention(*(heads_first(x[a:b]) for x in (q, k, v)), is_causal=True)[0]
            for a, b in pairwise(bounds)
        ]
        return torch.cat(parts, 1).transpose(0, 1)

    return {
        "ours": partial(forward_and_backward, lambda: packed_attention(q, k, v, cu_seqlens, max_seqlen=max(documents))),
        "a slice per document": partial(forward_and_backward, slices),
        "dense mask, SDPA": partial(forward_and_backward, dense),
        "dense mask, eager": partial(forward_and_backward, eager),
    }


def attention() -> str:
    documents = lengths(16, 4096)
    rows = []
    for dtype in DTYPES:
        for name, (least, median) in (
            timings := timing.interleaved(attention_implementations(documents, dtype))
        ).items():
            ratio = least / timings["ours"][0]
            rows.append([str(dtype)[6:], name, f"{least:.0f}", f"{median:.0f}", f"{ratio:.2f}×"])
    title = (
        f"Attention, forward and backward: T = 4,096, 16 documents of {min(documents)} to {max(documents)} tokens, H = "
        "8, D = 64"
    )
    return timing.table(title, ["", "way", "least ms", "median ms", "ours is faster by"], rows)


def _eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def _selected(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    labelled = labels != -100
    return _eager(hidden[labelled], weight, labels[labelled])


def _torch(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from torch.nn.modules.linear_cross_entropy_options import LinearCrossEntropyOptions

    loss: Tensor = torch.nn.functional.linear_cross_entropy(
        hidden, weight, labels, reduction="sum", ignore_index=-100, options=LinearCrossEntropyOptions()
    )
    return loss


def _cut(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    from cut_cross_entropy import linear_cross_entropy as cut

    loss: Tensor = cut(hidden, weight, labels, impl="torch_compile", reduction="sum")
    return loss


LOSSES: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "ours": linear_cross_entropy,
    "eager": _eager,
    "eager on labelled rows": _selected,
    "torch F.linear_cross_entropy": _torch,
    "cut-cross-entropy, torch_compile": _cut,
}


def _loss_inputs(dtype: torch.dtype, share: float) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, HIDDEN, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(VOCAB, HIDDEN, generator=generator) * 0.05).to(dtype).requires_grad_()
    labels = torch.randint(0, VOCAB, (TOKENS,), generator=generator)
    labels[torch.rand(TOKENS, generator=generator) > share] = -100
    return hidden, weight, labels


def _loss_step(name: str, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    LOSSES[name](*inputs).backward()
    inputs[0].grad = inputs[1].grad = None


def _available(name: str) -> bool:
    if name.startswith("torch"):
        return hasattr(torch.nn.functional, "linear_cross_entropy")
    return not name.startswith("cut") or find_spec("cut_cross_entropy") is not None


def loss_head() -> str:
    rows = []
    for dtype in DTYPES:
        for share in (0.35, 1.0):
            inputs = _loss_inputs(dtype, share)
            implementations: Implementations = {
                name: partial(_loss_step, name, inputs) for name in LOSSES if _available(name)
            }
            timings = timing.interleaved(implementations, rounds=5)
            for name, (least, median) in timings.items():
                memory = timing.in_own_process(__file__, "memory", name, str(dtype)[6:], str(share))
                figures = [f"{least:.0f}", f"{median:.0f}", f"{least / timings['ours'][0]:.2f}×", memory]
                rows.append([str(dtype)[6:], f"{share:.0%}", name, *figures])
    missing = [name for name in LOSSES if not _available(name)]
    note = f"Not installed, so not compared: {', '.join(missing)}.\n" if missing else ""
    title = f"Head and cross entropy, forward and backward: T = {TOKENS:,}, d = {HIDDEN}, V = {VOCAB:,}"
    columns = ["", "labelled", "way", "least ms", "median ms", "ours is faster by", "extra peak memory, MB"]
    return timing.table(title, columns, rows) + note


def memory(name: str, dtype: str, share: str) -> None:
    """Print what one forward and backward pass holds beyond its inputs."""
    inputs = _loss_inputs(getattr(torch, dtype), float(share))
    inputs[0].sum().backward()
    timing.reset_peak()
    megabytes_before = timing.peak_megabytes()
    _loss_step(name, inputs)
    print(f"{timing.peak_megabytes() - megabytes_before:.0f}")


def training_implementations(dtype: torch.dtype) -> Implementations:
    """One AdamW step of a 4-layer LLaMA, d = 256, in three implementations over the same 18 documents."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    from fireflyds.models.packed.forward import fuse

    documents = lengths(18, TOKENS)
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(3, VOCAB, (length,), generator=generator) for length in documents]
    learned = [torch.rand(length, generator=generator) < 0.35 for length in documents]
    shape = {"hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4}

    def model(attention: str) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        hf_model = AutoModelForCausalLM.from_config(
            LlamaConfig(vocab_size=VOCAB, **shape), dtype=dtype, attn_implementation=attention
        )
        return hf_model, torch.optim.AdamW(hf_model.parameters(), lr=1e-4)

    def step(forward: Callable[[], Tensor], optimizer: torch.optim.Optimizer) -> None:
        forward().backward()
        optimizer.step()
        optimizer.zero_grad()

    targets = [x.where(keep, -100) for x, keep in zip(ids, learned, strict=True)]
    flat, flat_targets = torch.cat(ids)[None], torch.cat(targets)
    positions = torch.cat([torch.arange(length) for length in documents])[None]
    # A document's first token is not a target.
    hf_targets = flat_targets.masked_fill(positions[0] == 0, -100)[None]
    shifted = torch.cat([hf_targets[0, 1:], torch.tensor([-100])])[None]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    padded_targets = torch.nn.utils.rnn.pad_sequence(targets, batch_first=True, padding_value=-100)
    attended = (torch.arange(padded.shape[1])[None] < torch.tensor(documents)[:, None]).long()
    batch = {
        "input_ids": flat,
        "labels": shifted,
        "position_ids": positions,
        "max_seqlen": max(documents),
        "cu_seqlens": torch.tensor([0, *accumulate(documents)], dtype=torch.int32),
        "num_labels": int((shifted != -100).sum()),
    }
    packed_model, packed_optimizer = model("sdpa")
    padded_model, padded_optimizer = model("sdpa")
    fused_model, fused_optimizer = model("sdpa")
    fuse(fused_model)
    return {
        "ours": partial(step, lambda: fused_model(**batch) / batch["num_labels"], fused_optimizer),
        "transformers, packed by position_ids": partial(
            step,
            lambda: packed_model(input_ids=flat, labels=hf_targets, position_ids=positions, use_cache=False).loss,
            packed_optimizer,
        ),
        "transformers, padded": partial(
            step,
            lambda: (
                padded_model(input_ids=padded, labels=padded_targets, attention_mask=attended, use_cache=False).loss
            ),
            padded_optimizer,
        ),
    }


def training() -> str:
    rows = []
    for dtype in DTYPES:
        timings = timing.interleaved(training_implementations(dtype), rounds=5)
        for name, (least, median) in timings.items():
            figures = [
                f"{least:.0f}",
                f"{median:.0f}",
                f"{TOKENS / least * 1e3:,.0f}",
                f"{least / timings['ours'][0]:.2f}×",
            ]
            rows.append([str(dtype)[6:], name, *figures])
    title = f"One AdamW step: LLaMA of 4 layers, d = 256, V = {VOCAB:,}; 18 documents, {TOKENS:,} tokens, 35 % labelled"
    return timing.table(title, ["", "way", "least ms", "median ms", "tokens/s", "ours is faster by"], rows)


def main() -> None:
    load_at_start = timing.load()
    parts = [attention(), loss_head(), training()]
    description = machine.describe("torch", "transformers")
    head = (
        "# Kernels on the CPU\n\n"
        f"{description}; {THREADS} threads; {load_at_start} at the start.\n"
        "Least and median of 5 to 7 turns, ways taken in turns in one process.\n"
    )
    out = Path(__file__).parent / "results" / f"kernels_cpu{os.cpu_count()}_{date.today():%Y%m}.md"
    out.write_text("\n".join([head, *parts]), encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    torch.set_num_threads(THREADS)
    memory(*sys.argv[2:]) if sys.argv[1:2] == ["memory"] else main()
