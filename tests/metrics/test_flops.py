"""FLOPs of a step compared with closed formulas and with torch's own counter; peak FLOPs of devices."""

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig

from fireflyds import app, registry
from fireflyds.config import Precision
from fireflyds.errors import UserError
from fireflyds.metrics.flops import known_gpus, peak_flops, step_flops, visible_pairs
from fireflyds.models import load, tuning
from fireflyds.models.packed.forward import fuse
from fireflyds.testing.models import packed_inputs, random_documents, tiny_model


def _model_without_weights(*overrides: str):
    config = app.compose("plan", ["experiment=firefly_llama2_7b_ext_cpt_qlora", *overrides])
    hf_config = load.architecture_of(config.model)
    family, rows = load.family_of(hf_config), load.base_vocab_size(config.model, hf_config)
    return tuning.apply_tuning(load.bare_model(hf_config), family, config.tuning, rows, 0)


# LLaMA-2-7B with 55,296 tokens: 32 blocks of 4 x 4096² + 3 x 4096 x 11008, and a head.
BODY, HEAD, WIDTH = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 55_296 * 4096, 4096


def test_llama_costs_six_flops_a_weight_and_token_and_attention_by_the_documents() -> None:
    flops = step_flops(_model_without_weights("tuning=full", "tuning.embeddings=all", "tuning.head=all"))
    lengths, labelled = [1024, 3000, 72], 4096 - 3
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    # Two products of 4,096 forward and four backward for each pair, in each of 32 blocks.
    assert flops.count(lengths, labelled) == 6 * BODY * 4096 + 6 * HEAD * labelled + 32 * 12 * WIDTH * pairs
    assert flops.count([4096], 0) > flops.count([1024] * 4, 0)
    # Documents may be added up, over batches and ranks too.
    assert flops.count(lengths, labelled) == pytest.approx(
        flops.count([1024], 100) + flops.count([3000, 72], labelled - 100)
    )


def test_with_adapters_gradients_of_frozen_weights_do_not_count() -> None:
    adapters = 159_907_840
    flops = step_flops(_model_without_weights())
    assert flops.per_token == 4 * BODY + 6 * adapters
    assert flops.per_label == 6 * HEAD
    # With frozen embeddings nothing below the first queries, keys and values needs a gradient: neither of the base's
    # three matrices nor of their A.
    frozen = step_flops(_model_without_weights("tuning.embeddings=frozen", "tuning.head=frozen"))
    assert frozen.per_token == flops.per_token - 3 * (2 * WIDTH**2 + 2 * WIDTH * 64)
    assert frozen.per_label == 4 * HEAD
    rows = step_flops(_model_without_weights("tuning.embeddings=new_rows", "tuning.head=new_rows"))
    assert rows.per_label == 4 * HEAD + 2 * 23_296 * WIDTH


def test_training_only_the_head_needs_no_backward_pass_of_the_body() -> None:
    flops = step_flops(_model_without_weights("tuning=freeze", "tuning.embeddings=frozen", "tuning.head=all"))
    assert (flops.per_token, flops.per_label) == (2 * BODY, 4 * HEAD)
    assert flops.per_pair == ((None, 32 * 4 * WIDTH),)


@pytest.mark.parametrize("model_type", registry.names("fireflyds.models.families"))
@pytest.mark.parametrize(
    "overrides",
    [
        ["tuning=full"],
        ["tuning=lora", "tuning.dropout=0", "tuning.r=4"],
        ["tuning=lora", "tuning.dropout=0", "tuning.r=4", "tuning.embeddings=all"],
        ["tuning=freeze", r"tuning.trainable=['\.1\.']"],
        ["tuning=freeze", "tuning.embeddings=frozen", "tuning.head=all"],
    ],
)
def test_flops_equal_torch_s_flop_counter(model_type: str, overrides: list[str]) -> None:
    config = app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=1", *overrides])
    family = registry.load("fireflyds.models.families", model_type).FAMILY
    changes = {"falcon": {"alibi": False}, "bloom": {}}.get(model_type, {"num_key_value_heads": 2})
    model = tuning.apply_tuning(
        tiny_model(model_type, tie_word_embeddings=False, **changes), family, config.tuning, None, 0
    )
    model.config._attn_implementation = "eager"
    flops = step_flops(model)
    tokens = 11
    # With batch and head dimensions only attention's products are batched.
    with FlopCounterMode(display=False) as counter:
        model(torch.arange(3, 3 + tokens)[None]).logits.sum().backward()
    counted = {str(kind): number for kind, number in counter.get_flop_counts()["Global"].items()}
    attention = sum(counted.pop(kind, 0) for kind in ("aten.bmm", "aten.baddbmm"))
    assert sum(counted.values()) == flops.count([], tokens) + flops.per_token * tokens
    head_dim = getattr(model.config, "head_dim", None) or model.config.hidden_size // 4
    # The rotary table is a product too: of positions and frequencies.
    rotary = 0 if model_type == "bloom" else tokens * head_dim
    assert attention - rotary == sum(cost for _, cost in flops.per_pair) * tokens**2


def test_fusing_does_not_change_flops() -> None:
    model = tiny_model("llama", tie_word_embeddings=False)
    flops = step_flops(model)
    batch = packed_inputs(random_documents())
    lengths = batch["cu_seqlens"].diff()
    assert step_flops(fuse(model)) == flops
    assert flops.count(lengths, 19) == flops.count([7, 1, 12, 3], 19)


def test_a_sliding_window_bounds_visible_pairs() -> None:
    def count_pairs(n: int, window: int) -> int:
        return sum(j <= i and i - j < window for i in range(n) for j in range(n))

    assert visible_pairs([3, 9, 20], 5) == sum(count_pairs(n, 5) for n in (3, 9, 20))
    assert visible_pairs(np.array([3, 9]), None) == 6 + 45
    assert step_flops(tiny_model("mistral", num_key_value_heads=2, sliding_window=4)).per_pair[0][0] == 4


def test_peak_flops_by_device_name() -> None:
    for name, precision, tflops in (
        ("NVIDIA H200", Precision.bf16, 989),
        ("NVIDIA A100-SXM4-80GB", Precision.fp32, 19.5),
        ("Tesla V100-SXM2-32GB", Precision.fp16, 125),
        ("Tesla V100-PCIE-16GB", Precision.fp16, 112),
        ("NVIDIA H100 PCIe", Precision.bf16, 756),
        ("NVIDIA H100 80GB HBM3", Precision.bf16, 989),
        ("NVIDIA GeForce RTX 4090", Precision.bf16, 165.2),
        ("NVIDIA A10", Precision.bf16, 125),
        ("NVIDIA GH200 480GB", Precision.bf16, 989),
    ):
        assert peak_flops(name, precision, None) == tflops * 1e12, name
    for name in known_gpus():
        assert peak_flops(name, Precision.fp16, None) > peak_flops(name, Precision.fp32, None)
    # None: a format that V100 lacks, and devices that are not in the table.
    assert peak_flops("Tesla V100-SXM2-32GB", Precision.bf16, None) is None
    assert peak_flops("NVIDIA A10G", Precision.bf16, None) is None
    assert peak_flops("cpu", Precision.fp32, None) is None
    assert peak_flops("cpu", Precision.fp32, 0.2) == 0.2e12


def test_a_peak_must_be_above_zero() -> None:
    with pytest.raises(UserError, match=r"hardware.peak_tflops=0.0: must be greater than 0"):
        app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=1", "hardware.peak_tflops=0"])


def test_experts_count_as_often_as_a_token_is_sent_to_one() -> None:
    counts = {}
    for used in (1, 2):
        model = tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=used, moe_intermediate_size=24, head_dim=8)
        counts[used] = step_flops(model).per_token
    # Two layers of gate, up and down, 32 x 24 each, forward and twice backward.
    assert counts[2] - counts[1] == 2 * (3 * 32 * 24) * 2 * 3


def test_layers_with_heads_of_another_size_cost_their_own() -> None:
    """Gemma 4: four heads of 12 in a layer with a window of 20, of 24 in one without; six products a pair."""
    settings = {"num_attention_heads": 4, "head_dim": 12, "global_head_dim": 24, "sliding_window": 20}
    kinds = {"layer_types": ["sliding_attention", "full_attention"], "num_hidden_layers": 2, "hidden_size": 48}
    model = load.bare_model(AutoConfig.for_model("gemma4_text", **settings, **kinds))
    assert dict(step_flops(model).per_pair) == {20: 12 * 4 * 12, None: 12 * 4 * 24}
