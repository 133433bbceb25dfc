"""Quantised weights become what their formats say, packed here by the formats' own descriptions."""

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from fireflyds.errors import UserError
from fireflyds.models.convert.checkpoint import convert_checkpoint

NAME = "model.layers.0.mlp.up_proj"
Case = tuple[dict[str, Any], dict[str, Tensor], str, Tensor]


def packed_rows(values: Tensor, bits: int) -> Tensor:
    """Packs the rows of `[n, m]` into int32 `[n * bits / 32, m]`, the first in the low bits, one integer at a time."""
    per = 32 // bits
    words = [
        [sum(int(values[row * per + i, column]) << (bits * i) for i in range(per)) for column in range(values.shape[1])]
        for row in range(len(values) // per)
    ]
    signed = [[word - (1 << 32) if word >= 1 << 31 else word for word in row] for row in words]
    return torch.tensor(signed, dtype=torch.int32)


def fp8(generator: torch.Generator) -> Case:
    weight = torch.randn(5, 6, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(2, 2, generator=generator) + 0.5
    expected = torch.stack(
        [torch.stack([weight[i, j].float() * scales[i // 4, j // 4] for j in range(6)]) for i in range(5)]
    )
    settings = {"quant_method": "fp8", "weight_block_size": [4, 4]}
    return settings, {f"{NAME}.weight": weight, f"{NAME}.weight_scale_inv": scales}, f"{NAME}.weight", expected


def mxfp4(generator: torch.Generator) -> Case:
    """Two experts of three outputs and 64 inputs in two groups."""
    codes = torch.randint(0, 16, (2, 3, 64), generator=generator)
    exponents = torch.randint(120, 132, (2, 3, 2), generator=generator, dtype=torch.uint8)
    table = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = torch.tensor([*table, *(-value for value in table)])[codes]
    expected = (values.unflatten(2, (2, 32)) * 2.0 ** (exponents.float()[..., None] - 127)).flatten(2).transpose(1, 2)
    blocks = (codes[..., 0::2] | codes[..., 1::2] << 4).to(torch.uint8).unflatten(2, (2, 16))
    name = "model.layers.0.mlp.experts.gate_up_proj"
    return {"quant_method": "mxfp4"}, {f"{name}_blocks": blocks, f"{name}_scales": exponents}, name, expected


def gptq(generator: torch.Generator, first_format: bool = True) -> Case:
    """16 inputs in shuffled groups of 8, and 8 outputs."""
    codes = torch.randint(0, 16, (16, 8), generator=generator)
    zeros = torch.randint(1, 16, (2, 8), generator=generator)
    scales = torch.rand(2, 8, generator=generator) + 0.1
    groups = torch.randperm(16, generator=generator) // 8
    expected = ((codes - zeros[groups]) * scales[groups]).T
    stored = zeros - 1 if first_format else zeros
    tensors = {
        "qweight": packed_rows(codes, 4), "qzeros": packed_rows(stored.T, 4).T.contiguous(), "scales": scales,
        "g_idx": groups.int(),
    }  # fmt: skip
    settings = {"quant_method": "gptq", "bits": 4, "group_size": 8, "desc_act": True}
    settings |= {} if first_format else {"checkpoint_format": "gptq_v2"}
    return settings, {f"{NAME}.{key}": tensor for key, tensor in tensors.items()}, f"{NAME}.weight", expected


def awq(generator: torch.Generator) -> Case:
    """16 inputs in groups of 8, and 16 outputs; of eight outputs a word holds 0, 2, 4, 6, 1, 3, 5, 7."""
    codes = torch.randint(0, 16, (16, 16), generator=generator)
    zeros = torch.randint(0, 16, (2, 16), generator=generator)
    scales = torch.rand(2, 16, generator=generator) + 0.1
    expected = ((codes - zeros.repeat_interleave(8, 0)) * scales.repeat_interleave(8, 0)).T
    order = [half * 8 + place for half in range(2) for place in (0, 2, 4, 6, 1, 3, 5, 7)]

    def packed(values: Tensor) -> Tensor:
        return packed_rows(values[:, order].T, 4).T.contiguous()

    tensors = {"qweight": packed(codes), "qzeros": packed(zeros), "scales": scales}
    settings = {"quant_method": "awq", "bits": 4, "group_size": 8, "version": "gemm"}
    return settings, {f"{NAME}.{key}": tensor for key, tensor in tensors.items()}, f"{NAME}.weight", expected


def nf4(generator: torch.Generator) -> Case:
    weight = torch.randn(64, 128, generator=generator)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4", compress_statistics=True)
    expected = bnb.dequantize_4bit(packed, state)
    tensors = {f"{NAME}.weight": packed} | {
        f"{NAME}.weight.{key}": value for key, value in state.as_dict(packed=True).items()
    }
    return {"quant_method": "bitsandbytes", "load_in_4bit": True}, tensors, f"{NAME}.weight", expected


def int8(generator: torch.Generator) -> Case:
    codes = torch.randint(-127, 128, (4, 6), generator=generator, dtype=torch.int8)
    largest = torch.rand(4, generator=generator) + 1
    tensors = {"weight": codes, "SCB": largest, "weight_format": torch.tensor(0, dtype=torch.uint8)}
    expected = torch.stack([codes[row].float() * largest[row] / 127 for row in range(4)])
    named = {f"{NAME}.{key}": tensor for key, tensor in tensors.items()}
    return {"quant_method": "bitsandbytes", "load_in_8bit": True}, named, f"{NAME}.weight", expected


def compressed_int4(generator: torch.Generator) -> Case:
    codes = torch.randint(-8, 8, (4, 16), generator=generator)
    scales = torch.rand(4, 2, generator=generator) + 0.1
    tensors = {
        "weight_packed": packed_rows((codes + 8).T, 4).T.contiguous(), "weight_scale": scales,
        "weight_shape": torch.tensor([4, 16]),
    }  # fmt: skip
    expected = codes * scales.repeat_interleave(8, 1)
    named = {f"{NAME}.{key}": tensor for key, tensor in tensors.items()}
    return {"quant_method": "compressed-tensors", "format": "pack-quantized"}, named, f"{NAME}.weight", expected


def compressed_fp8(generator: torch.Generator) -> Case:
    weight = torch.randn(4, 6, generator=generator).to(torch.float8_e4m3fn)
    scales = torch.rand(4, 1, generator=generator) + 0.5
    tensors = {f"{NAME}.weight": weight, f"{NAME}.weight_scale": scales}
    settings = {"quant_method": "compressed-tensors", "format": "float-quantized"}
    return settings, tensors, f"{NAME}.weight", weight.float() * scales


CASES = {
    "fp8": fp8, "mxfp4": mxfp4, "gptq": gptq, "gptq v2": lambda generator: gptq(generator, first_format=False),
    "awq": awq, "nf4": nf4, "int8": int8, "compressed int4": compressed_int4, "compressed fp8": compressed_fp8,
}  # fmt: skip


def save(folder: Path, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Path:
    config = {"model_type": "llama", "torch_dtype": "float32", "quantization_config": settings}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(tensors | {"model.norm.weight": torch.ones(3)}, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("make", CASES.values(), ids=CASES)
def test_weights_are_dequantised_and_the_rest_is_kept(make: Any, tmp_path: Path) -> None:
    settings, tensors, name, expected = make(torch.Generator().manual_seed(0))
    converted = convert_checkpoint(save(tmp_path, settings, tensors))
    assert converted.entries.keys() == {name, "model.norm.weight"}
    assert "quantization_config" not in converted.config
    entry = converted.entries[name]
    weight = entry.make()
    assert [*weight.shape] == entry.shape == [*expected.shape]
    assert weight.dtype == entry.dtype == torch.float32
    torch.testing.assert_close(weight, expected.float(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"quant_method": "quip"}, "quant_method=quip"),
        ({"quant_method": "gptq", "bits": 3}, "bits=3"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "version=gemv"),
    ],
)
def test_other_methods_are_refused_by_name(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    tensors = gptq(torch.Generator().manual_seed(0))[1]
    with pytest.raises(UserError, match=f"quantised in a way that is not read here.*{message}"):
        convert_checkpoint(save(tmp_path, settings, tensors))


@pytest.mark.parametrize("part", ["weight_zero_point", "weight_g_idx"])
def test_variants_of_compressed_tensors_are_refused_by_name(part: str, tmp_path: Path) -> None:
    settings, tensors, _, _ = compressed_int4(torch.Generator().manual_seed(0))
    with pytest.raises(UserError, match=part):
        convert_checkpoint(save(tmp_path, settings, tensors | {f"{NAME}.{part}": torch.zeros(4)}))
