"""Kernels on the local GPU, each compared with what it replaces. Needs only torch and triton.

    python benchmarks/bench_kernels_gpu.py [folder]      writes kernels_<gpu>_<yyyymm>.md there (benchmarks/results)

Liger, cut-cross-entropy and PEFT with bitsandbytes are compared where they are installed, and named where not.
"""

import statistics
import sys
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from importlib.util import find_spec
from itertools import accumulate
from pathlib import Path
from typing import Any

import timing
import torch
from fireflyds_kernels import force, linear_cross_entropy, packed_attention, qlora_linear, rms_norm, rope, swiglu
from fireflyds_kernels.packed_attention import flash
from torch import Tensor
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

BF16 = torch.bfloat16
Implementations = dict[str, Callable[[], Any]]


def milliseconds(implementations: Implementations, rounds: int = 15) -> dict[str, float]:
    """The median of each way's device time, in turns, with the second-level cache emptied in between."""
    flush = torch.empty(1 << 28, dtype=torch.int8, device="cuda")
    times: dict[str, list[float]] = {name: [] for name in implementations}
    for turn in range(rounds + 3):
        for name, run in implementations.items():
            flush.zero_()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            torch.cuda.synchronize()
            if turn >= 3:
                times[name].append(begin.elapsed_time(end))
    return {name: statistics.median(values) for name, values in times.items()}


def peak_gib(run: Callable[[], Any]) -> float:
    """GiB that a run allocates beyond the memory in use before."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    bytes_before = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - bytes_before) / 2**30


def leaf(*shape: int, scale: float = 1.0, dtype: torch.dtype = BF16) -> Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype).requires_grad_()


def backward_of(forward: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], Any]:
    """The backward pass alone."""
    out = forward()
    upstream = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, leaves, upstream, retain_graph=True)


def _varlen(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, longest: int) -> Tensor:
    return flash.torch_varlen(q, k, v, cu_seqlens, longest, True, q.shape[2] ** -0.5, None, None)


def _forced(name: str, *arguments: Any, **options: Any) -> Tensor:
    with force(packed_attention=name):
        return packed_attention(*arguments, **options)


def attention() -> Iterator[str]:
    function, parameters = flash._varlen()
    causal = {"window_size": (-1, 0)} if "window_size" in parameters else {"is_causal": True}
    rows = []
    for documents in ([1024] * 16, [8192] * 2, [1024, 3072, 2048, 8192, 2048]):
        total, longest = sum(documents), max(documents)
        q, k, v = (leaf(total, 32, 128) for _ in range(3))
        cu_seqlens = torch.tensor([0, *accumulate(documents)], dtype=torch.int32, device="cuda")
        forwards: Implementations = {
            "torch varlen_attn, raw": partial(function, q, k, v, cu_seqlens, cu_seqlens, longest, longest, **causal),
            "ours, through varlen_attn": partial(_forced, "torch_varlen", q, k, v, cu_seqlens, max_seqlen=longest),
            "ours, Triton": partial(_forced, "triton", q, k, v, cu_seqlens, max_seqlen=longest),
            "ours, efficient (V100's path)": partial(_forced, "efficient", q, k, v, cu_seqlens, max_seqlen=longest),
        }
        for pass_name, implementations, products in (
            ("forward", forwards, 2),
            ("backward", {name: backward_of(run, (q, k, v)) for name, run in forwards.items()}, 5),
        ):
            times = milliseconds(implementations)
            flops = products * sum(length**2 for length in documents) * 32 * 128
            for name, ms in times.items():
                relative_speed = times["torch varlen_attn, raw"] / ms
                rows.append(
                    [
                        str(len(documents)),
                        f"{longest:,}",
                        pass_name,
                        name,
                        f"{ms:.3f}",
                        f"{flops / ms / 1e9:.0f}",
                        f"{relative_speed:.3f}×",
                    ]
                )
    columns = ["documents", "longest", "", "way", "ms", "TFLOP/s", "of raw varlen_attn's speed"]
    yield timing.table("Attention, bfloat16, H = 32, D = 128", columns, rows)

    documents = [512] * 16
    total = sum(documents)
    q, k, v = (leaf(total, 32, 128) for _ in range(3))
    cu_seqlens = torch.tensor([0, *accumulate(documents)], dtype=torch.int32, device="cuda")
    document = torch.arange(total, device="cuda") // 512
    mask = (document[:, None] == document[None]) & torch.ones(total, total, dtype=torch.bool, device="cuda").tril()

    def dense() -> Tensor:
        first = [x.transpose(0, 1)[None] for x in (q, k, v)]
        return scaled_dot_product_attention(*first, attn_mask=mask)

    forwards_of_masks = {
        "ours": lambda: packed_attention(q, k, v, cu_seqlens, max_seqlen=512),
        "dense mask, SDPA": dense,
    }
    times = milliseconds(
        {n: lambda run=run: torch.autograd.grad(run().sum(), (q, k, v)) for n, run in forwards_of_masks.items()}
    )
    rows = [[name, f"{ms:.3f}", f"{ms / times['ours']:.2f}×"] for name, ms in times.items()]
    yield timing.table(
        "16 documents of 512 in 8,192 tokens, forward and backward", ["way", "ms", "ours is faster by"], rows
    )


def _eager(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    return cross_entropy((hidden @ weight.T).float(), labels, reduction="sum")


def loss_implementations() -> dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]]:
    implementations: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
        "ours": linear_cross_entropy,
        "eager": _eager,
    }
    if find_spec("liger_kernel"):
        from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy as liger

        implementations["Liger"] = lambda h, w, y: liger(h, w, y, reduction="sum")
    if find_spec("cut_cross_entropy"):
        from cut_cross_entropy import linear_cross_entropy as cut

        implementations["cut-cross-entropy, exact"] = lambda h, w, y: cut(h, w, y, impl="cce_exact", reduction="sum")
    return implementations


def loss_head() -> Iterator[str]:
    rows = []
    weight = leaf(55_296, 4096, scale=0.02)
    for tokens, share in ((4096, 1.0), (8192, 1.0), (4096, 0.35), (8192, 0.35), (32_768, 1.0)):
        hidden = leaf(tokens, 4096)
        labels = torch.randint(0, 55_296, (tokens,), device="cuda")
        labels[torch.rand(tokens, device="cuda") > share] = -100

        def forward_and_backward(run: Callable[..., Tensor], hidden: Tensor = hidden, labels: Tensor = labels) -> Any:
            return torch.autograd.grad(run(hidden, weight, labels), (hidden, weight))

        implementations: Implementations = {
            name: partial(forward_and_backward, run) for name, run in loss_implementations().items()
        }
        times = milliseconds(implementations, rounds=7)
        for name, ms in times.items():
            ratio = ms / times["ours"]
            rows.append(
                [
                    f"{tokens:,}",
                    f"{share:.0%}",
                    name,
                    f"{ms:.2f}",
                    f"{ratio:.2f}×",
                    f"{peak_gib(implementations[name]):.2f}",
                ]
            )
    columns = ["tokens", "labelled", "way", "ms", "ours is faster by", "extra peak memory, GiB"]
    yield timing.table("Head and cross entropy, forward and backward, bfloat16, d = 4,096, V = 55,296", columns, rows)


def elementwise() -> Iterator[str]:
    source = torch.empty(1 << 28, dtype=BF16, device="cuda")
    target = torch.empty_like(source)
    copy = 2 * source.nbytes / milliseconds({"copy": lambda: target.copy_(source)})["copy"] / 1e6
    liger = find_spec("liger_kernel") is not None
    if liger:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction
        from liger_kernel.ops.rope import LigerRopeFunction
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction
    rows = []

    def measure(
        kernel: str, implementations: Implementations, leaves: tuple[Tensor, ...], moved: tuple[int, int]
    ) -> None:
        for index, (direction, bytes_moved) in enumerate(zip(("forward", "backward"), moved, strict=True)):
            differentiable = {name: run for name, run in implementations.items() if index == 0 or run().requires_grad}
            runs = (
                differentiable
                if index == 0
                else {name: backward_of(run, leaves) for name, run in differentiable.items()}
            )
            times = milliseconds(runs)
            for name, ms in times.items():
                speed = bytes_moved / ms / 1e6
                rows.append(
                    [
                        kernel,
                        direction,
                        name,
                        f"{ms:.3f}",
                        f"{speed:,.0f}",
                        f"{speed / copy:.0%}",
                        f"{ms / times['ours']:.2f}×",
                    ]
                )

    x, weight = leaf(16_384, 4096), leaf(4096)
    implementations: Implementations = {"ours": lambda: rms_norm(x, weight, 1e-5)}
    if liger:
        implementations["Liger"] = lambda: LigerRMSNormFunction.apply(x, weight, 1e-5, 0.0, "llama", False)
    measure("rms_norm 16,384 × 4,096", implementations, (x, weight), (2 * x.nbytes, 3 * x.nbytes))
    gate, up = leaf(16_384, 11_008), leaf(16_384, 11_008)
    implementations = {"ours": lambda: swiglu(gate, up)}
    if liger:
        implementations["Liger"] = lambda: LigerSiLUMulFunction.apply(gate, up)
    measure("swiglu 16,384 × 11,008", implementations, (gate, up), (3 * gate.nbytes, 5 * gate.nbytes))
    q, k = leaf(16_384, 32, 128), leaf(16_384, 8, 128)
    angles = torch.rand(16_384, 64, device="cuda").repeat(1, 2)
    cos, sin = angles.cos().to(BF16), angles.sin().to(BF16)
    implementations = {"ours": lambda: rope(q, k, cos, sin)[0]}
    if liger:
        # It rotates q and k in place, forward and backward, so every round is timed on the same memory.
        rotated = [x.detach().transpose(0, 1)[None] for x in (q, k)]
        implementations["Liger"] = lambda: LigerRopeFunction.apply(*rotated, cos[None], sin[None])[0]
    bytes_rotated = 2 * (q.nbytes + k.nbytes)
    measure("rope 16,384 × (32 + 8) × 128", implementations, (q,), (bytes_rotated, bytes_rotated))
    columns = ["", "", "way", "ms", "GB/s", f"of a copy's {copy:,.0f} GB/s", "ours is faster by"]
    yield timing.table("Elementwise, bfloat16", columns, rows)


def qlora() -> Iterator[str]:
    if not find_spec("bitsandbytes"):
        return
    import bitsandbytes

    x, a, b = (
        leaf(4096, 4096),
        leaf(64, 4096, scale=0.02, dtype=torch.float32),
        leaf(11_008, 64, scale=0.02, dtype=torch.float32),
    )
    # Quantised from bfloat16, as models are: unpacked weights have the number format that was quantised.
    base, peer = (
        bitsandbytes.nn.Linear4bit(4096, 11_008, bias=False, compute_dtype=BF16, quant_type="nf4").to(BF16).cuda()
        for _ in range(2)
    )
    implementations: Implementations = {
        "ours": lambda: torch.autograd.grad(qlora_linear(x, base.weight, a, b, 0.25).sum(), (x, a, b))
    }
    if find_spec("peft"):
        from peft import LoraConfig, inject_adapter_in_model

        holder = torch.nn.ModuleDict({"layer": peer})
        holder.is_loaded_in_4bit = True
        layer: Any = inject_adapter_in_model(LoraConfig(r=64, lora_alpha=16, target_modules=["layer"]), holder)["layer"]
        leaves = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)

        def with_peft() -> Any:
            with torch.autocast("cuda", BF16):  # its adapters are float32
                return torch.autograd.grad(layer(x).sum(), leaves)

        implementations["PEFT and bitsandbytes"] = with_peft
    times = milliseconds(implementations)
    rows = [[name, f"{ms:.3f}", f"{ms / times['ours']:.2f}×"] for name, ms in times.items()]
    yield timing.table(
        "qlora_linear, 4,096 tokens, 4,096 → 11,008, r = 64, forward and backward",
        ["way", "ms", "ours is faster by"],
        rows,
    )


def main(folder: Path) -> None:
    if not torch.cuda.is_available():
        sys.exit("error: torch sees no GPU here")
    torch.manual_seed(0)
    name = torch.cuda.get_device_name()
    missing = [peer for peer in ("liger_kernel", "cut_cross_entropy", "bitsandbytes", "peft") if not find_spec(peer)]
    versions = f"torch {torch.__version__}, triton {__import__('triton').__version__}, CUDA {torch.version.cuda}"
    parts = [
        f"# Kernels on {name}\n\n{versions}, {date.today().isoformat()}. Medians of device time, ways taken in turns.\n"
    ]
    if missing:
        parts.append(f"Not installed, so not compared: {', '.join(missing)}.\n")
    short = name.lower().removeprefix("nvidia ").replace(" ", "-")
    out = folder / f"kernels_{short}_{date.today():%Y%m}.md"
    failed = False
    for section in (attention, loss_head, elementwise, qlora):
        try:
            new = list(section())
        except Exception as error:  # the others are measured all the same
            new, failed = [f"{section.__name__} failed: {error!r}\n"], True
        parts += new
        print("\n".join(new), flush=True)
        out.write_text("\n".join(parts), encoding="utf-8")
    sys.exit(failed)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent / "results")
