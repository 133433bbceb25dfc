"""Planned activations against what autograd saves, for every family, and for adapters on a quantised base."""

import weakref
from pathlib import Path

import pytest
import torch
from fireflyds_kernels import dispatch

from fireflyds import app, registry
from fireflyds.config import Precision, TrainConfig
from fireflyds.models import load, tuning
from fireflyds.models.packed.forward import fuse
from fireflyds.planner import activations
from fireflyds.planner.model_shape import ExpertShape, ModelShape, model_shape
from fireflyds.testing.models import packed_inputs, tiny_model

TOKENS = 37
LORA = ["tuning=lora", "tuning.r=4"]
TRITON = {"rms_norm": "triton", "swiglu": "triton", "rope": "triton", "packed_attention": "triton"}
# Falcon has one norm in front of both sides or two, one key head, several or as many as queries, and blocks in
# sequence.
FORMS = {
    "falcon": [
        {"alibi": False},
        {"alibi": True},
        {"alibi": False, "new_decoder_architecture": True, "num_kv_heads": 2},
        {"alibi": False, "parallel_attn": False, "multi_query": False},
    ],
    "bloom": [{}],
}
MODELS = [
    (family, form)
    for family in registry.names("fireflyds.models.families")
    for form in FORMS.get(family, [{"num_key_value_heads": 2}])
]


class _SavedTensor:
    """A tensor that autograd saves; it is not counted if autograd releases it before the pass ends."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _saved_bytes(model) -> int:
    """Bytes that autograd saves in one pass, without parameters and inputs."""
    batch, saved_tensors = packed_inputs([torch.arange(3, 30), torch.arange(3, 13)]), weakref.WeakSet()
    excluded_pointers = {tensor.untyped_storage().data_ptr() for tensor in [*model.parameters(), *model.buffers()]}
    excluded_pointers |= {
        tensor.untyped_storage().data_ptr() for tensor in batch.values() if isinstance(tensor, torch.Tensor)
    }
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            quantization_tensors = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
            excluded_pointers |= {tensor.untyped_storage().data_ptr() for tensor in quantization_tensors}

    def pack(tensor: torch.Tensor) -> _SavedTensor:
        saved_tensors.add(saved_tensor := _SavedTensor(tensor))
        return saved_tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved_tensor: saved_tensor.tensor):
        loss = fuse(model)(**batch)
    assert loss.isfinite()
    storages = {
        saved.tensor.untyped_storage().data_ptr(): saved.tensor.untyped_storage().nbytes() for saved in saved_tensors
    }
    return sum(size for pointer, size in storages.items() if pointer not in excluded_pointers)


def _measure(
    model_type: str, form: dict, overrides: list[str], layers: int, dtype: torch.dtype, kernels: dict[str, str]
):
    config = app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=1", *overrides])
    model = tiny_model(model_type, num_hidden_layers=layers, tie_word_embeddings=False, **form)
    family = load.family_of(model.config)
    model = tuning.apply_tuning(model, family, config.tuning, None, 0).to(dtype).train()
    shape = model_shape(model, config)
    with dispatch.force(**kernels):
        return _saved_bytes(model), shape, config


def _planned_bytes(shape: ModelShape, config: TrainConfig, dtype: torch.dtype, device: str, *, fused: bool) -> float:
    forward_spec = activations.ForwardSpec(
        device=device,
        wide=dtype.itemsize,
        half=False,
        dropout=config.tuning.dropout if config.tuning.has_adapters else 0.0,
        fused_adapters=fused,
        dora=config.tuning.use_dora,
        checkpointing=False,
    )
    block = shape.blocks[2]
    return activations.block_bytes(block, shape, forward_spec) * TOKENS + activations.weight_bytes(block, forward_spec)


@pytest.mark.parametrize(("model_type", "form"), MODELS)
@pytest.mark.parametrize(
    ("overrides", "dtype", "device"),
    [
        (["tuning=full"], torch.float32, "cpu"),
        (["tuning=full"], torch.bfloat16, "cpu"),
        (["tuning=full"], torch.float16, "cuda"),
        ([*LORA, "tuning.dropout=0"], torch.bfloat16, "cpu"),
        pytest.param([*LORA, "tuning.dropout=0"], torch.float16, "cuda", marks=pytest.mark.slow),
        # Dropout saves a byte mask on a GPU and floats on the CPU, so GPU dropout cannot be measured here.
        ([*LORA, "tuning.dropout=0.1"], torch.bfloat16, "cpu"),
        (["tuning=freeze", r"tuning.trainable=[mlp]"], torch.float32, "cpu"),
    ],
)
def test_planned_activations_of_a_block_equal_the_tensors_autograd_saves(
    model_type: str, form: dict, overrides: list[str], dtype, device: str
) -> None:
    kernels = TRITON if device == "cuda" else {}
    # Rotary tables are saved once for all blocks: a third block adds none.
    bytes_of_two_blocks, _, _ = _measure(model_type, form, overrides, 2, dtype, kernels)
    bytes_of_three_blocks, shape, config = _measure(model_type, form, overrides, 3, dtype, kernels)
    # RMS norms are exact; the two statistics that a layer norm saves per row have the half-precision type on the CPU.
    rel = 0.01 if shape.form.layer_norm else 1e-9
    assert _planned_bytes(shape, config, dtype, device, fused=False) == pytest.approx(
        bytes_of_three_blocks - bytes_of_two_blocks, rel=rel
    )


EXPERTS = {"num_experts": 7, "num_local_experts": 7, "num_experts_per_tok": 3, "moe_intermediate_size": 40}


@pytest.mark.parametrize("model_type", ["qwen3_moe", "mixtral"])
@pytest.mark.parametrize(
    ("overrides", "dtype"), [(["tuning=full"], torch.float32), ([*LORA, "tuning.dropout=0"], torch.bfloat16)]
)
def test_planned_activations_of_experts_are_near_what_autograd_saves(
    model_type: str, overrides: list[str], dtype: torch.dtype
) -> None:
    form = EXPERTS | {"num_key_value_heads": 2, "head_dim": 8, "hidden_size": 48, "sliding_window": None}
    two, _, _ = _measure(model_type, form, overrides, 2, dtype, {})
    three, shape, config = _measure(model_type, form, overrides, 3, dtype, {})
    assert shape.blocks[2].experts == ExpertShape(
        3, 7, 40 if model_type == "qwen3_moe" else 64, "lora" not in overrides[0]
    )
    assert _planned_bytes(shape, config, dtype, "cpu", fused=False) == pytest.approx(three - two, rel=0.05)


def _measure_quantised(folder: Path, *overrides: str):
    """Saved bytes of a third block, and its planned bytes."""
    measurements = []
    for layers in (2, 3):
        settings = {"num_hidden_layers": layers, "num_key_value_heads": 2, "tie_word_embeddings": False}
        tiny_model("llama", hidden_size=64, intermediate_size=128, **settings).save_pretrained(folder / str(layers))
        required = ["run=x", f"model={folder / str(layers)}", "data=c/d", "optim.steps=1", "tuning=qlora", "tuning.r=4"]
        config = app.compose("train", [*required, *overrides])
        model = tuning.load_tuned_model(config, load.architecture_of(config.model), Precision.bf16).train()
        for parameter in model.parameters():
            if parameter.dtype is torch.float32:
                parameter.data = parameter.data.bfloat16()
        measurements.append((_saved_bytes(model), model_shape(model, config), config))
    (bytes_of_two_blocks, _, _), (bytes_of_three_blocks, shape, config) = measurements
    return bytes_of_three_blocks - bytes_of_two_blocks, _planned_bytes(
        shape, config, torch.bfloat16, "cpu", fused=not config.tuning.use_dora
    )


def test_planned_activations_of_the_fused_qlora_layer(tmp_path) -> None:
    saved, planned = _measure_quantised(tmp_path)
    assert planned == pytest.approx(saved, rel=0.03)


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_planned_activations_of_dora_on_a_quantised_base(tmp_path, dropout: float) -> None:
    saved, planned = _measure_quantised(tmp_path, "tuning.use_dora=true", f"tuning.dropout={dropout}")
    assert planned == pytest.approx(saved, rel=0.03)
