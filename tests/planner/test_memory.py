"""Planned memory: bytes by hand for whole models, loss heads, placements."""

from dataclasses import replace

import pytest

from fireflyds import app
from fireflyds.config import Precision
from fireflyds.models import load, tuning
from fireflyds.planner import measured_memory, memory
from fireflyds.planner.measured_memory import format_peak, resident_bytes
from fireflyds.planner.memory import Placement, kept_of
from fireflyds.planner.model_shape import model_shape
from fireflyds.testing.models import tiny_model

BODY, EMBEDDINGS, NORMS = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 55_296 * 4096, 65 * 4096
WHOLE = BODY + 2 * EMBEDDINGS + NORMS
FULL = ["tuning=full", "tuning.embeddings=all", "tuning.head=all", "optim=adamw"]


def _asked(*overrides: str, precision=Precision.bf16, device="cuda", **where):
    config = app.compose("plan", ["experiment=firefly_llama2_7b_ext_cpt_qlora", "seq_len=4096", *overrides])
    hf_config = load.architecture_of(config.model)
    family, rows = load.family_of(hf_config.model_type), load.base_vocab_size(config.model, hf_config)
    model = tuning.apply_tuning(load.bare_model(hf_config), family, config.tuning, rows, 0)
    placement = replace(Placement(0, False, False, 4, False, 1, 2), **where)
    return model_shape(model, config), config, precision, placement, device


def _plan(*overrides: str, **options) -> memory.MemoryEstimate:
    return memory.estimate(*_asked(*overrides, **options))


def _moments(*overrides: str, **options) -> dict[str, dict[str, float]]:
    return memory.moments(*_asked(*overrides, **options))


def _states(found: memory.MemoryEstimate) -> float:
    assert found.moment in ("loss", "backward")
    return found.items["weights"] + found.items["gradients"] + found.items["optimizer"]


def test_full_training_holds_sixteen_bytes_a_parameter_and_zero_shards_them() -> None:
    # Weights and gradients of 2 bytes, masters of 4, two states of 4.
    assert _states(_plan(*FULL)) == 16 * WHOLE
    assert _states(_plan(*FULL, stage=1, world_size=8)) == pytest.approx((4 + 12 / 8) * WHOLE)
    assert _states(_plan(*FULL, stage=3, world_size=8)) == pytest.approx(16 * WHOLE / 8)
    # Stage 2 keeps whole every gradient that touches its part: here at most the embeddings and the head.
    second = _states(_plan(*FULL, stage=2, world_size=8))
    assert (2 + 14 / 8) * WHOLE < second < (2 + 14 / 8) * WHOLE + 2 * 2 * EMBEDDINGS
    # In float32 the weights are their own masters, but ZeRO keeps a copy.
    assert _states(_plan(*FULL, precision=Precision.fp32)) == 16 * WHOLE
    assert _states(_plan(*FULL, precision=Precision.fp32, stage=1)) == 20 * WHOLE


def test_eight_bit_states_and_offloading_take_their_bytes_away() -> None:
    eight = _plan(*FULL, "optim=adamw_8bit", stage=1)
    assert eight.items["optimizer"] == (4 + 2) * WHOLE
    away = _plan(*FULL, stage=2, offload_optimizer=True, world_size=4)
    assert (away.items["optimizer"], away.items["gradients"]) == (0, 0)
    # Masters, states, float32 gradients, a copy of the shard and the gradients that add up.
    assert away.host == pytest.approx((12 + 4 + 2 + 2) * WHOLE / 4)
    all_away = _plan(*FULL, stage=3, offload_optimizer=True, offload_param=True, world_size=4)
    assert all_away.items["weights"] == 0
    assert all_away.host == pytest.approx((12 + 4 + 2 + 2 + 2) * WHOLE / 4)
    assert all_away.host_loading == 2 * WHOLE


def test_a_quantised_body_takes_4127_thousandths_of_a_bit_each() -> None:
    found = _plan()
    adapters = 159_907_840
    weights = BODY * 4.127 / 8 + 2 * (adapters + 2 * EMBEDDINGS + NORMS)
    assert found.items["weights"] == pytest.approx(weights, rel=1e-4)
    assert found.items["optimizer"] == 12 * (adapters + 2 * EMBEDDINGS)
    assert found.host_loading == 0


def test_activations_of_llama_are_eight_rows_and_three_wide_ones_a_block() -> None:
    found, tokens = _moments(*FULL, "seq_len=1024"), 4 * 1024
    # Input of the block, both normed, q, k, v, attention's output and the sum; gate, up and their product: 2 bytes
    # each. The log-sum-exp of 32 heads and the scales of two norms: 4 bytes each.
    block = 2 * (8 * 4096 + 3 * 11008) + 4 * (32 + 2)
    assert found["loss"]["activations"] == 32 * block * tokens
    again = _moments(*FULL, "seq_len=1024", checkpointing=True)
    assert again["loss"]["activations"] == 32 * 2 * 4096 * tokens
    # One block is whole again, and gradients of its feed-forward layer pass through it.
    passing = 2 * (3 * 11008 + 2 * 4096)
    assert again["backward"]["activations"] == (32 * 2 * 4096 + block + passing) * tokens
    # Half the tokens, half the activations.
    assert _moments(*FULL, "seq_len=512")["loss"]["activations"] == 16 * block * tokens


def test_blocks_below_the_lowest_trained_one_keep_nothing() -> None:
    body = ["tuning=freeze", "tuning.embeddings=frozen", "tuning.head=frozen", "seq_len=1024"]
    top = _moments(*body, r"tuning.trainable=['layers\.(28|29|30|31)\.']")
    every = _moments(*body, r"tuning.trainable=['layers\.']")
    assert top["loss"]["activations"] == every["loss"]["activations"] / 8


def test_the_loss_holds_one_chunk_of_logits_and_the_head_s_gradient() -> None:
    frozen = ["tuning.embeddings=frozen", "tuning.head=frozen"]
    hidden = 1024 * 4096 * 2 * (3 + 2)
    found = _moments(*frozen, "seq_len=1024", micro_batch_size=1)
    assert found["loss"]["logits"] == 1024 * 55_296 * 2 + hidden
    # 3.6 GB of logits are taken in chunks of at most 256 MiB; the head's gradient adds up in float32.
    long = _moments("seq_len=16384", micro_batch_size=2)
    logits = 32_768 * 55_296 * 2
    chunk = logits / -(-logits // 2**28)
    assert chunk <= 2**28
    assert long["loss"]["logits"] == pytest.approx(chunk + 4 * EMBEDDINGS + 32 * hidden)


def test_gradients_that_touch_a_part_are_kept_whole() -> None:
    assert kept_of((10, 10, 10), 1) == 30
    assert kept_of((10, 10, 10), 2) == 20
    assert kept_of((10, 10), 2) == 10
    assert kept_of((100,), 4) == 100


def test_the_line_of_a_run_names_the_peak_and_its_parts() -> None:
    config = app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=1", "zero=1", "seq_len=65536"])
    text = memory.format_memory(tiny_model("llama", num_key_value_heads=2), config, Precision.fp32, 1, 1)
    assert text.startswith("planned peak 0.")
    assert "GiB per rank, without libraries, phase: " in text
    assert "activations 0." in text


def test_what_was_measured_is_told_over_what_was_there_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resident_bytes()
    assert before > 2**27
    monkeypatch.setattr(measured_memory, "resident_bytes", lambda: before + 3 * 2**29)
    assert format_peak(before) == "measured peak 1.50 GiB per rank, without libraries"
