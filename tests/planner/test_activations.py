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
from fireflyds.planner.model_shape import ModelShape, model_shape
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


class _Held:
    """A tensor that autograd keeps, as long as it does: what has been forgotten when the pass ends does not count."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def _kept(model) -> int:
    """Bytes that autograd keeps of one pass, parameters and inputs aside."""
    batch, held = packed_inputs([torch.arange(3, 30), torch.arange(3, 13)]), weakref.WeakSet()
    own = {each.untyped_storage().data_ptr() for each in [*model.parameters(), *model.buffers()]}
    own |= {each.untyped_storage().data_ptr() for each in batch.values() if isinstance(each, torch.Tensor)}
    for parameter in model.parameters():
        if state := getattr(parameter, "quant_state", None):
            parts = [state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code]
            own |= {each.untyped_storage().data_ptr() for each in parts}

    def keep(tensor: torch.Tensor) -> _Held:
        held.add(found := _Held(tensor))
        return found

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda found: found.tensor):
        loss = fuse(model)(**batch)
    assert loss.isfinite()
    storages = {each.tensor.untyped_storage().data_ptr(): each.tensor.untyped_storage().nbytes() for each in held}
    return sum(size for place, size in storages.items() if place not in own)


def _saved(model_type: str, form: dict, overrides: list[str], layers: int, dtype: torch.dtype, kernels: dict[str, str]):
    config = app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=1", *overrides])
    family = registry.load("fireflyds.models.families", model_type).FAMILY
    model = tiny_model(model_type, num_hidden_layers=layers, tie_word_embeddings=False, **form)
    model = tuning.apply_tuning(model, family, config.tuning, None, 0).to(dtype).train()
    shape = model_shape(model, config)
    with dispatch.force(**kernels):
        return _kept(model), shape, config


def _planned(shape: ModelShape, config: TrainConfig, dtype: torch.dtype, device: str, *, fused: bool) -> float:
    how = activations.ForwardSpec(
        device=device,
        wide=dtype.itemsize,
        half=False,
        dropout=config.tuning.dropout if config.tuning.has_adapters else 0.0,
        fused_adapters=fused,
        dora=config.tuning.use_dora,
        checkpointing=False,
    )
    block = shape.blocks[2]
    return activations.block_bytes(block, shape, how) * TOKENS + activations.weight_bytes(block, how)


@pytest.mark.parametrize(("model_type", "form"), MODELS)
@pytest.mark.parametrize(
    ("overrides", "dtype", "device"),
    [
        (["tuning=full"], torch.float32, "cpu"),
        (["tuning=full"], torch.bfloat16, "cpu"),
        (["tuning=full"], torch.float16, "cuda"),
        ([*LORA, "tuning.dropout=0"], torch.bfloat16, "cpu"),
        ([*LORA, "tuning.dropout=0"], torch.float16, "cuda"),
        # A GPU's dropout keeps bytes, the CPU's numbers, so the one is not seen on the other.
        ([*LORA, "tuning.dropout=0.1"], torch.bfloat16, "cpu"),
        (["tuning=freeze", r"tuning.trainable=[mlp]"], torch.float32, "cpu"),
    ],
)
def test_a_block_keeps_what_autograd_saves(
    model_type: str, form: dict, overrides: list[str], dtype, device: str
) -> None:
    kernels = TRITON if device == "cuda" else {}
    # Rotary tables are kept once, by whatever blocks share them: a third block adds none.
    two, _, _ = _saved(model_type, form, overrides, 2, dtype, kernels)
    three, shape, config = _saved(model_type, form, overrides, 3, dtype, kernels)
    # RMS norms are exact; the two numbers that a layer norm keeps of a row are of the narrow type on the CPU.
    rel = 0.01 if shape.form.layer_norm else 1e-9
    assert _planned(shape, config, dtype, device, fused=False) == pytest.approx(three - two, rel=rel)


def _quantised(folder: Path, *overrides: str):
    """What a third block adds, and what was planned for it."""
    found = []
    for layers in (2, 3):
        settings = {"num_hidden_layers": layers, "num_key_value_heads": 2, "tie_word_embeddings": False}
        tiny_model("llama", hidden_size=64, intermediate_size=128, **settings).save_pretrained(folder / str(layers))
        given = ["run=x", f"model={folder / str(layers)}", "data=c/d", "optim.steps=1", "tuning=qlora", "tuning.r=4"]
        config = app.compose("train", [*given, *overrides])
        model = tuning.load_tuned_model(config, load.architecture_of(config.model), Precision.bf16).train()
        for parameter in model.parameters():
            if parameter.dtype is torch.float32:
                parameter.data = parameter.data.bfloat16()
        found.append((_kept(model), model_shape(model, config), config))
    (two, _, _), (three, shape, config) = found
    return three - two, _planned(shape, config, torch.bfloat16, "cpu", fused=not config.tuning.use_dora)


def test_our_qlora_layer_keeps_its_input_its_mask_and_the_adapter_s_inner_values(tmp_path) -> None:
    kept, planned = _quantised(tmp_path)
    assert planned == pytest.approx(kept, rel=0.03)


@pytest.mark.parametrize("dropout", [0, 0.1])
def test_dora_on_a_quantised_base_keeps_unpacked_weights_behind_its_dropout(tmp_path, dropout: float) -> None:
    kept, planned = _quantised(tmp_path, "tuning.use_dora=true", f"tuning.dropout={dropout}")
    assert planned == pytest.approx(kept, rel=0.03)
