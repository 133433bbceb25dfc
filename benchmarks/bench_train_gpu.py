"""Training steps of LLaMA-2's shapes on the local GPU: fireflyds, transformers, Liger, and PEFT with bitsandbytes.

    python benchmarks/bench_train_gpu.py [folder] [--rounds 2] [--only full|qlora]

Writes `train_<gpu>_<yyyymm>.md` there (`train_full_<...>` with `--only full`). Full-parameter: 7B, V = 55,296, 8,192
packed tokens, bfloat16 weights and AdamW states. QLoRA: 7B and 13B, 4,096 packed tokens, NF4 with double quantisation,
r = 64 on every linear layer of the blocks. All recompute layers, and all take attention per document: peers by
`torch.nn.attention.varlen` (FlashAttention-2) with boundaries given once a batch, as transformers' FlashAttention
integration does.
Every contender is a process of its own, in turns; the same weights, documents and optimizer; one process without
DeepSpeed. Needs torch, transformers and omegaconf; peers that are not installed are named (`requirements-train.txt`).

MFU: 6 FLOPs a weight and token (4 where the weight is frozen) of every linear layer and the head, and attention's
products over each document's own triangle; what is recomputed does not count. Over the matrix product's speed measured
in the same run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import timing
import torch
from torch import Tensor, nn

VOCAB, WARMUP, STEPS, RANK, ALPHA = 55_296, 3, 8, 64, 16
SHAPES = {
    "7B": {"hidden_size": 4096, "intermediate_size": 11_008, "num_hidden_layers": 32, "num_attention_heads": 32},
    "13B": {"hidden_size": 5120, "intermediate_size": 13_824, "num_hidden_layers": 40, "num_attention_heads": 40},
}
# Documents learn everything; of real dialogues in a chat template 88.8 % of the tokens are learned (bench_train's
# store).
TASKS = {
    "full": {"tokens": 8192, "documents": 16, "learned": 1.0},
    "qlora": {"tokens": 4096, "documents": 12, "learned": 0.888},
}
# Task, shape, contender: what it must be able to import, and how many times faster ours is to be.
CASES: list[tuple[str, str, str, tuple[str, ...], float | None]] = [
    ("full", "7B", "ours", ("omegaconf",), None),
    ("full", "7B", "HF, varlen attention", (), 1.1),
    ("full", "7B", "HF, varlen attention, Liger", ("liger_kernel",), 1.03),
    ("qlora", "7B", "ours", ("omegaconf", "bitsandbytes", "peft"), None),
    ("qlora", "7B", "PEFT and bitsandbytes", ("bitsandbytes", "peft"), 1.2),
    ("qlora", "13B", "ours", ("omegaconf", "bitsandbytes", "peft"), None),
    ("qlora", "13B", "PEFT and bitsandbytes", ("bitsandbytes", "peft"), 1.2),
]
COLUMNS = "|ms a step|tokens/s|least to most|learned tokens/s|MFU|ours is faster by|asked|peak GiB|first loss"
Batch = dict[str, Any]
Case = tuple[str, str, str]


def lengths(count: int, total: int) -> list[int]:
    """`count` document lengths with a long tail that add up to `total`, as in `bench_kernels.py`."""
    draws = torch.distributions.LogNormal(0.0, 0.75).icdf((torch.arange(count) + 0.5) / count)
    values: list[int] = (draws / draws.sum() * total).int().clamp(min=8).tolist()
    values[-1] += total - sum(values)
    return values


def make_batch(task: str, vocab: int, device: str) -> tuple[Batch, Batch, list[int]]:
    """One row for fireflyds and for transformers (which shifts labels itself), and the lengths of its documents."""
    task_settings = TASKS[task]
    documents = lengths(int(task_settings["documents"]), int(task_settings["tokens"]))
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocab, (1, sum(documents)), generator=generator)
    positions = torch.cat([torch.arange(length) for length in documents])[None]
    labels = ids.masked_fill(torch.rand(ids.shape, generator=generator) > task_settings["learned"], -100)
    labels = labels.masked_fill(positions == 0, -100)
    shifted = torch.cat([labels[:, 1:], torch.full((1, 1), -100)], 1)
    cu_seqlens, longest = torch.tensor([0, *accumulate(documents)], dtype=torch.int32).to(device), max(documents)
    shared_inputs = {"input_ids": ids.to(device), "position_ids": positions.to(device)}
    learned = int((shifted != -100).sum())
    packed_batch = shared_inputs | {
        "labels": shifted.to(device),
        "cu_seqlens": cu_seqlens,
        "max_seqlen": longest,
        "num_labels": learned,
    }
    hf_batch = shared_inputs | {
        "labels": labels.to(device),
        "use_cache": False,
        "cu_seq_lens_q": cu_seqlens,
        "cu_seq_lens_k": cu_seqlens,
        "max_length_q": longest,
        "max_length_k": longest,
    }
    return packed_batch, hf_batch, documents


def varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    cu_seq_lens_q: Tensor,
    max_length_q: int,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface over torch's FlashAttention-2: `[1, H, T, D]` in, `[1, T, H, D]` out."""
    from fireflyds_kernels.packed_attention.flash import torch_varlen

    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))
    out = torch_varlen(q, k, v, cu_seq_lens_q, max_length_q, True, scaling or q.shape[-1] ** -0.5, None, None)
    return out[None], None


def make_model(shape: dict[str, int], vocab: int, device: str) -> Any:
    """Random weights in bfloat16, equal for all contenders."""
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM

    AttentionInterface.register("varlen", varlen)
    torch.manual_seed(0)
    settings = LlamaConfig(vocab_size=vocab, max_position_embeddings=8192, tie_word_embeddings=False, **shape)
    default_dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(settings)
    finally:
        torch.set_default_dtype(default_dtype)
    # Without a registered mask transformers makes none.
    model.config._attn_implementation = "varlen"
    model.config.use_cache = False
    model.gradient_checkpointing_enable({"use_reentrant": False})
    return model.train()


def to_four_bit(model: nn.Module, device: str) -> None:
    """Every linear layer of the blocks to NF4, double quantisation, as `BitsAndBytesConfig` would load it; then
    adapters."""
    import bitsandbytes
    from peft import LoraConfig, inject_adapter_in_model

    names: list[str] = []
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ".layers." in name:
            layer = bitsandbytes.nn.Linear4bit(
                module.in_features,
                module.out_features,
                bias=False,
                compute_dtype=torch.bfloat16,
                quant_type="nf4",
                compress_statistics=True,
                device="meta",
            )
            layer.weight = bitsandbytes.nn.Params4bit(
                module.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=True, module=layer
            )
            parent, _, last = name.rpartition(".")
            setattr(model.get_submodule(parent), last, layer.to(device))
            names.append(last)
    model.requires_grad_(False)
    model.is_loaded_in_4bit = True  # type: ignore[assignment]
    torch.manual_seed(0)
    targets = sorted(set(names))
    config = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    inject_adapter_in_model(config, model, "default")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def model_flops(model: nn.Module, documents: list[int]) -> float:
    """Of one step, recomputation left out."""
    tokens, total = sum(documents), 0.0
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        # PEFT's layer around a linear layer has its sizes and its weight too.
        if "lora_" in name or hasattr(module, "lora_A") or not hasattr(module, "in_features") or weight is None:
            continue
        total += (6 if weight.requires_grad else 4) * module.in_features * module.out_features * tokens
    total += sum(6 * p.numel() * tokens for name, p in model.named_parameters() if "lora_" in name)
    config = model.config
    # Two products of n²/2 · d a layer forward, twice that backward.
    total += sum(6 * length**2 for length in documents) * config.hidden_size * config.num_hidden_layers  # type: ignore[operator, union-attr]
    return total


def contender(task: str, name: str, model: Any, packed_batch: Batch, hf_batch: Batch) -> Callable[[], Tensor]:
    """A forward pass to the mean loss."""
    if name == "ours":
        from fireflyds.models.packed.forward import fuse

        fuse(model)
        return lambda: model(**packed_batch) / packed_batch["num_labels"]
    if "Liger" in name:
        from liger_kernel.transformers import _apply_liger_kernel_to_instance

        _apply_liger_kernel_to_instance(model)
    if task == "full":
        return lambda: model(**hf_batch).loss

    def autocast() -> Tensor:
        # As Trainer runs PEFT in bf16: without it float32 adapters would be multiplied with bfloat16 activations.
        with torch.autocast(packed_batch["input_ids"].device.type, torch.bfloat16):
            loss: Tensor = model(**hf_batch).loss
        return loss

    return autocast


def measure(task: str, shape: str, name: str) -> dict[str, float]:
    """Milliseconds of a step (median), its FLOPs, tokens, peak memory, and the first loss."""
    device = "cuda"
    packed_batch, hf_batch, documents = make_batch(task, VOCAB, device)
    model = make_model(SHAPES[shape], VOCAB, device)
    if task == "qlora":
        to_four_bit(model, device)
    flops = model_flops(model, documents)
    forward = contender(task, name, model, packed_batch, hf_batch)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-5, fused=True)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    times, first_loss = [], 0.0
    for step in range(WARMUP + STEPS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        loss = forward()
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        first_loss = first_loss or (float(loss.detach()) if step == 0 else 0.0)
    seconds = statistics.median(times[WARMUP:])
    return {
        "ms": seconds * 1e3,
        "tokens": sum(documents) / seconds,
        "learned": packed_batch["num_labels"] / seconds,
        "loss": first_loss,
        "flops": flops / seconds,
        "gib": torch.cuda.max_memory_allocated() / 2**30,
    }


def matrix_peak() -> float:
    """FLOP/s of the best of some large bfloat16 products."""
    peak = 0.0
    for n, k, m in ((8192, 8192, 8192), (8192, 4096, 11_008), (8192, 4096, 4096)):
        a, b = (torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for shape in ((n, k), (k, m)))
        for turn in range(13):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(10):
                a @ b
            torch.cuda.synchronize()
            if turn >= 3:
                peak = max(peak, 10 * 2 * n * k * m / (time.perf_counter() - start))
    return peak


def report(results: dict[Case, list[dict[str, float]]], failed: dict[Case, str], peak: float) -> str:
    """A table of every task and shape."""
    parts = []
    measured_cases = {key[:2] for key in (*results, *failed)}
    for task, shape in dict.fromkeys(case[:2] for case in CASES if case[:2] in measured_cases):
        rows = []
        for _, _, name, packages, target in (case for case in CASES if case[:2] == (task, shape)):
            key, missing = (task, shape, name), [package for package in packages if not find_spec(package)]
            turns, fireflyds_turns = results.get(key, []), results.get((task, shape, "ours"), [])
            if not turns:
                reason = f"not installed: {', '.join(missing)}" if missing else failed.get(key, "not run")
                rows.append([name, reason, *[""] * 8])
                continue
            medians = {metric: statistics.median(turn[metric] for turn in turns) for metric in turns[0]}
            speeds = [turn["tokens"] for turn in turns]
            ratio = (
                f"{statistics.median(turn['tokens'] for turn in fireflyds_turns) / medians['tokens']:.2f}×"
                if fireflyds_turns
                else ""
            )
            rows.append(
                [
                    name,
                    f"{medians['ms']:,.0f}",
                    f"{medians['tokens']:,.0f}",
                    f"{min(speeds):,.0f} to {max(speeds):,.0f}",
                    f"{medians['learned']:,.0f}",
                    f"{medians['flops'] / peak:.1%}",
                    ratio,
                    f"{target:g}×" if target else "",
                    f"{medians['gib']:.1f}",
                    f"{medians['loss']:.4f}",
                ]
            )
        task_data = TASKS[task]
        title = (
            f"{task}, {shape}: {task_data['tokens']:,} tokens, {task_data['documents']} documents, "
            f"{task_data['learned']:.1%} "
            "learned"
        )
        parts.append(timing.table(title, COLUMNS.split("|"), rows))
    return "\n".join(parts)


def main(folder: Path, rounds: int, only: str | None) -> None:
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU here")
    folder.mkdir(parents=True, exist_ok=True)
    name, peak = torch.cuda.get_device_name(), matrix_peak()
    torch.cuda.empty_cache()
    short = name.lower().removeprefix("nvidia ").replace(" ", "-")
    out = folder / f"train_{f'{only}_' if only else ''}{short}_{date.today():%Y%m}.md"
    versions = ", ".join(f"{package} {version(package)}" for package in ("torch", "triton", "transformers"))
    results: dict[Case, list[dict[str, float]]] = {}
    failed: dict[Case, str] = {}
    available = [
        case for case in CASES if only in (None, case[0]) and all(find_spec(dependency) for dependency in case[3])
    ]
    for number in range(rounds):
        for task, shape, contender_name, *_ in available if number % 2 == 0 else available[::-1]:
            command = [sys.executable, __file__, "--turn", task, shape, contender_name]
            completed = subprocess.run(command, capture_output=True, text=True, check=False)
            result = next((line[7:] for line in completed.stdout.splitlines() if line.startswith("RESULT ")), None)
            if result is None:
                failed[task, shape, contender_name] = (
                    f"failed: {(completed.stderr.strip().splitlines() or ['no message'])[-1][:200]}"
                )
            else:
                results.setdefault((task, shape, contender_name), []).append(json.loads(result))
            print(number + 1, task, shape, contender_name, result or failed[task, shape, contender_name], flush=True)
            head = (
                f"# Training steps on {name}\n\n"
                f"{versions}, CUDA {torch.version.cuda}, {date.today().isoformat()}. Matrix peak measured: "
                f"{peak / 1e12:,.0f} TFLOP/s. {STEPS} steps a turn after {WARMUP} of warm-up; medians.\n\n"
            )
            # Written after every turn, so that results remain if a later turn fails.
            out.write_text(head + report(results, failed, peak), encoding="utf-8")
    print(out.read_text(encoding="utf-8"))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent / "results")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--only", choices=["full", "qlora"])
    parser.add_argument("--turn", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.turn:
        print("RESULT", json.dumps(measure(*arguments.turn)))
    else:
        main(arguments.folder, arguments.rounds, arguments.only)
