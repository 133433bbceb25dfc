"""Weights in 16 bits from quantised files: FP8 by blocks, MXFP4, GPTQ, AWQ, bitsandbytes and compressed-tensors.

Layouts are those of the programs that write them: DeepSeek-V3's `inference/fp8_cast_bf16.py`, the OCP MX specification
1.0 (E2M1 values, E8M0 scales), AutoGPTQ, AutoAWQ, bitsandbytes' `QuantState`, compressed-tensors' compressors.
"""

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fireflyds.errors import UserError
from fireflyds.tokenizer.shards import TensorEntry

_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# The place of each of eight columns in the integer that AutoAWQ packs them into.
_AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
Tensors = Mapping[str, Tensor]
Make = Callable[[], Tensor]


def dequantized(folder: Path, settings: dict[str, Any], tensors: Tensors, dtype: torch.dtype) -> dict[str, TensorEntry]:
    """Returns all weights of a quantised model, those that were quantised in `dtype`; computed when they are written.

    Args:
        settings: `quantization_config` of its `config.json`.

    Raises:
        UserError: a method or a variant of it that is not known.
    """
    method = settings.get("quant_method", "bitsandbytes" if "load_in_4bit" in settings else "")
    if method not in _METHODS:
        raise _unknown(folder, f"quant_method={method}")
    entries: dict[str, TensorEntry] = {}
    used: set[str] = set()
    for name in tensors:
        found = _METHODS[method](folder, settings, tensors, name)
        if found is not None:
            target, sources, shape, make = found
            entries[target] = TensorEntry([*shape], dtype, partial(_cast, make, dtype))
            used |= sources
    for name in tensors.keys() - used:
        tensor = tensors[name]
        entries[name] = TensorEntry([*tensor.shape], tensor.dtype, partial(_as_is, tensor))
    return dict(sorted(entries.items()))


Found = tuple[str, set[str], list[int], Make] | None


def _fp8(folder: Path, settings: dict[str, Any], tensors: Tensors, name: str) -> Found:
    """`weight` in E4M3 and `weight_scale_inv`, a factor for every block of `weight_block_size`."""
    weight, scales = tensors[name], tensors.get(f"{name}_scale_inv")
    if scales is None or weight.dtype != torch.float8_e4m3fn:
        return None
    block = settings.get("weight_block_size") or [128, 128]
    return name, {name, f"{name}_scale_inv"}, [*weight.shape], partial(_by_blocks, weight, scales, block)


def _by_blocks(weight: Tensor, scales: Tensor, block: list[int]) -> Tensor:
    if scales.numel() == 1:
        return weight.float() * scales.float()
    rows, columns = weight.shape[-2:]
    factors = scales.float().repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return weight.float() * factors[..., :rows, :columns]


def _mxfp4(folder: Path, settings: dict[str, Any], tensors: Tensors, name: str) -> Found:
    """`*_blocks`: two E2M1 values a byte, the first in the low bits, 32 to a group; `*_scales`: exponents, bias 127."""
    if not name.endswith("_blocks"):
        return None
    target = name.removesuffix("_blocks")
    blocks, scales = tensors[name], tensors[f"{target}_scales"]
    experts, rows, groups, half = blocks.shape
    make = partial(_by_exponents, blocks, scales)
    return target, {name, f"{target}_scales"}, [experts, groups * half * 2, rows], make


def _by_exponents(blocks: Tensor, scales: Tensor) -> Tensor:
    table = torch.tensor(_E2M1 + tuple(-value for value in _E2M1))
    values = torch.stack((table[(blocks & 15).long()], table[(blocks >> 4).long()]), -1).flatten(-2)
    # Experts of gpt-oss multiply from the right: files have rows of outputs.
    return torch.ldexp(values, scales.int()[..., None] - 127).flatten(-2).transpose(1, 2)


def _gptq(folder: Path, settings: dict[str, Any], tensors: Tensors, name: str) -> Found:
    """`qweight` packs rows of inputs, `qzeros` columns of outputs; `g_idx` is the group of every input. The first
    format stores zero points less one."""
    if not name.endswith(".qweight"):
        return None
    prefix, bits = name.removesuffix(".qweight"), int(settings["bits"])
    if bits not in (2, 4, 8):
        raise _unknown(folder, f"bits={bits}")
    names = {f"{prefix}.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")} & tensors.keys()
    packed, outputs = tensors[name].shape
    offset = 0 if "gptq_v2" in (settings.get("checkpoint_format"), settings.get("format")) else 1
    size = int(settings.get("group_size", -1))
    qzeros, scales = tensors[f"{prefix}.qzeros"], tensors[f"{prefix}.scales"]
    make = partial(_by_groups, tensors[name], qzeros, scales, tensors.get(f"{prefix}.g_idx"), bits, offset, size)
    return f"{prefix}.weight", names, [outputs, packed * 32 // bits], make


def _by_groups(
    qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor | None, bits: int, offset: int, size: int
) -> Tensor:
    values = _unpacked(qweight.T, bits).T
    zeros = (_unpacked(qzeros, bits) + offset) & ((1 << bits) - 1) if offset else _unpacked(qzeros, bits)
    inputs = len(values)
    groups = torch.arange(inputs) // (inputs if size < 0 else size) if g_idx is None else g_idx.long()
    return ((values - zeros[groups]).float() * scales.float()[groups]).T


def _unpacked(packed: Tensor, bits: int) -> Tensor:
    """Integers of `bits` from the columns of int32, the first in the low bits: `[n, m]` to `[n, m * 32 / bits]`."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32)
    return ((packed[..., None] >> shifts) & ((1 << bits) - 1)).flatten(-2)


def _awq(folder: Path, settings: dict[str, Any], tensors: Tensors, name: str) -> Found:
    """As GPTQ's, with columns of outputs packed in another order, and zero points as they are."""
    if not name.endswith(".qweight"):
        return None
    if int(settings.get("bits", 4)) != 4 or settings.get("version", "gemm").lower() != "gemm":
        raise _unknown(folder, f"bits={settings.get('bits')}, version={settings.get('version')}")
    prefix = name.removesuffix(".qweight")
    parts = [tensors[f"{prefix}.{part}"] for part in ("qweight", "qzeros", "scales")]
    inputs, packed = tensors[name].shape
    names = {f"{prefix}.{part}" for part in ("qweight", "qzeros", "scales")}
    return f"{prefix}.weight", names, [packed * 8, inputs], partial(_awq_weight, *parts)


def _awq_weight(qweight: Tensor, qzeros: Tensor, scales: Tensor) -> Tensor:
    values, zeros = (
        _unpacked(part, 4).unflatten(-1, (-1, 8))[..., list(_AWQ_ORDER)].flatten(-2) for part in (qweight, qzeros)
    )
    repeats = len(values) // len(zeros)
    return ((values - zeros.repeat_interleave(repeats, 0)).float() * scales.float().repeat_interleave(repeats, 0)).T


def _bitsandbytes(folder: Path, settings: dict[str, Any], tensors: Tensors, name: str) -> Found:
    """Four bits: `weight` and the parts of its `QuantState`; eight: `weight` and the largest of each row, `SCB`."""
    prefix = name.removesuffix(".weight")
    if name.endswith(".weight") and f"{prefix}.SCB" in tensors:
        weight, largest = tensors[name], tensors[f"{prefix}.SCB"]
        names = {name, f"{prefix}.SCB", f"{prefix}.weight_format"}
        return name, names, [*weight.shape], lambda: weight.float() * largest.float()[:, None] / 127
    state = {key: tensors[key] for key in tensors if key.startswith(f"{name}.")} if name.endswith(".weight") else {}
    if not state:
        return None
    from bitsandbytes.functional import QuantState, dequantize_4bit

    quant_state = QuantState.from_dict({key.removeprefix(f"{prefix}."): t for key, t in state.items()}, "cpu")
    return name, {name, *state}, [*quant_state.shape], partial(dequantize_4bit, tensors[name], quant_state)


def _compressed_tensors(folder: Path, settings: dict[str, Any], tensors: Tensors, name: str) -> Found:
    """`weight` in FP8 or int8 with a factor for the tensor, each row or each group, or int4 in `weight_packed`."""
    prefix, _, kind = name.rpartition(".")
    scales = tensors.get(f"{prefix}.weight_scale")
    if scales is None or kind not in ("weight", "weight_packed"):
        return None
    for part in ("weight_zero_point", "weight_g_idx"):
        if f"{prefix}.{part}" in tensors:
            raise _unknown(folder, f"{part}: asymmetric weights, or groups in another order")
    names = {name, f"{prefix}.weight_scale", f"{prefix}.weight_shape", f"{prefix}.input_scale"} & tensors.keys()
    weight = tensors[name]
    if kind == "weight":
        return name, names, [*weight.shape], partial(_by_rows, weight, scales)
    shape = tensors[f"{prefix}.weight_shape"].tolist()
    if (
        settings.get("format") != "pack-quantized"
        or weight.shape[1] * 8 < shape[1]
        or weight.shape[1] * 8 >= shape[1] + 8
    ):
        raise _unknown(folder, f"format={settings.get('format')} with other than 4 bits")
    return f"{prefix}.weight", names, shape, lambda: _by_rows(_unpacked(weight, 4)[:, : shape[1]] - 8, scales)


def _by_rows(weight: Tensor, scales: Tensor) -> Tensor:
    scales = scales.float()
    if scales.dim() == 2 and scales.shape[1] > 1:
        scales = scales.repeat_interleave(weight.shape[1] // scales.shape[1], 1)
    return weight.float() * (scales if scales.dim() != 1 or len(scales) == 1 else scales[:, None])


_METHODS = {
    "fp8": _fp8, "mxfp4": _mxfp4, "gptq": _gptq, "awq": _awq, "bitsandbytes": _bitsandbytes,
    "compressed-tensors": _compressed_tensors,
}  # fmt: skip


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def _cast(make: Make, dtype: torch.dtype) -> Tensor:
    return make().to(dtype)


def _unknown(folder: Path, what: str) -> UserError:
    return UserError(
        f"its weights are quantised in a way that is not read here ({what})",
        key="model",
        value=folder,
        remedy="Give the model that it was quantised from",
    )
