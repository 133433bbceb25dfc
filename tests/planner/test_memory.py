"""Planned memory compared with closed formulas: models, loss heads, placements."""

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
NUM_PARAMETERS = BODY + 2 * EMBEDDINGS + NORMS
FULL = ["tuning=full", "tuning.embeddings=all", "tuning.head=all", "optim=adamw"]


def _arguments(*overrides: str, precision=Precision.bf16, device="cuda", **placement_options):
    config = app.compose("plan", ["experiment=firefly_llama2_7b_ext_cpt_qlora", "seq_len=4096", *overrides])
    hf_config = load.architecture_of(config.model)
    family, rows = load.family_of(hf_config), load.base_vocab_size(config.model, hf_config)
    model = tuning.apply_tuning(load.bare_model(hf_config), family, config.tuning, rows, 0)
    placement = replace(Placement(0, False, False, 4, False, 1, 2), **placement_options)
    return model_shape(model, config), config, precision, placement, device


def _plan(*overrides: str, **options) -> memory.MemoryEstimate:
    return memory.estimate(*_arguments(*overrides, **options))


def _moments(*overrides: str, **options) -> dict[str, dict[str, float]]:
    return memory.moments(*_arguments(*overrides, **options))


def _state_bytes(estimate: memory.MemoryEstimate) -> float:
    assert estimate.moment in ("loss", "backward")
    return estimate.items["weights"] + estimate.items["gradients"] + estimate.items["optimizer"]


def test_full_training_holds_sixteen_bytes_a_parameter_and_zero_shards_them() -> None:
    # Weights and gradients of 2 bytes, masters of 4, two states of 4.
    assert _state_bytes(_plan(*FULL)) == 16 * NUM_PARAMETERS
    assert _state_bytes(_plan(*FULL, stage=1, world_size=8)) == pytest.approx((4 + 12 / 8) * NUM_PARAMETERS)
    assert _state_bytes(_plan(*FULL, stage=3, world_size=8)) == pytest.approx(16 * NUM_PARAMETERS / 8)
    # Stage 2 keeps every gradient that overlaps its partition: here at most the embeddings and the head.
    stage_2 = _state_bytes(_plan(*FULL, stage=2, world_size=8))
    assert (2 + 14 / 8) * NUM_PARAMETERS < stage_2 < (2 + 14 / 8) * NUM_PARAMETERS + 2 * 2 * EMBEDDINGS
    # In float32 the weights are their own masters, but ZeRO keeps a copy.
    assert _state_bytes(_plan(*FULL, precision=Precision.fp32)) == 16 * NUM_PARAMETERS
    assert _state_bytes(_plan(*FULL, precision=Precision.fp32, stage=1)) == 20 * NUM_PARAMETERS


def test_eight_bit_states_and_offloading_reduce_device_memory() -> None:
    eight_bit = _plan(*FULL, "optim=adamw_8bit", stage=1)
    assert eight_bit.items["optimizer"] == (4 + 2) * NUM_PARAMETERS
    offloaded = _plan(*FULL, stage=2, offload_optimizer=True, world_size=4)
    assert (offloaded.items["optimizer"], offloaded.items["gradients"]) == (0, 0)
    # Masters, states, float32 gradients, a copy of the shard and the gradients that add up.
    assert offloaded.host == pytest.approx((12 + 4 + 2 + 2) * NUM_PARAMETERS / 4)
    fully_offloaded = _plan(*FULL, stage=3, offload_optimizer=True, offload_param=True, world_size=4)
    assert fully_offloaded.items["weights"] == 0
    assert fully_offloaded.host == pytest.approx((12 + 4 + 2 + 2 + 2) * NUM_PARAMETERS / 4)
    # One parameter at a time, as a float32 copy and in 16 bits: the embeddings are the largest.
    assert fully_offloaded.host_loading == (4 + 2) * 55_296 * 4096


def test_a_quantised_body_takes_4_127_bits_per_weight() -> None:
    estimate = _plan()
    adapters = 159_907_840
    weights = BODY * 4.127 / 8 + 2 * (adapters + 2 * EMBEDDINGS + NORMS)
    assert estimate.items["weights"] == pytest.approx(weights, rel=1e-4)
    assert estimate.items["optimizer"] == 12 * (adapters + 2 * EMBEDDINGS)
    assert estimate.host_loading == 0


def test_activations_of_a_llama_block() -> None:
    moments, tokens = _moments(*FULL, "seq_len=1024"), 4 * 1024
    # Input of the block, both normed, q, k, v, attention's output and the sum; gate, up and their product: 2 bytes
    # each. The log-sum-exp of 32 heads and the scales of two norms: 4 bytes each.
    block = 2 * (8 * 4096 + 3 * 11008) + 4 * (32 + 2)
    assert moments["loss"]["activations"] == 32 * block * tokens
    checkpointed = _moments(*FULL, "seq_len=1024", checkpointing=True)
    assert checkpointed["loss"]["activations"] == 32 * 2 * 4096 * tokens
    # One block is recomputed, and gradients of its feed-forward layer exist at the same time.
    feed_forward_gradients = 2 * (3 * 11008 + 2 * 4096)
    assert checkpointed["backward"]["activations"] == (32 * 2 * 4096 + block + feed_forward_gradients) * tokens
    # Half the tokens, half the activations.
    assert _moments(*FULL, "seq_len=512")["loss"]["activations"] == 16 * block * tokens


def test_blocks_below_the_lowest_trained_one_save_no_activations() -> None:
    body = ["tuning=freeze", "tuning.embeddings=frozen", "tuning.head=frozen", "seq_len=1024"]
    upper_blocks = _moments(*body, r"tuning.trainable=['layers\.(28|29|30|31)\.']")
    all_blocks = _moments(*body, r"tuning.trainable=['layers\.']")
    assert upper_blocks["loss"]["activations"] == all_blocks["loss"]["activations"] / 8


def test_the_loss_holds_one_chunk_of_logits_and_the_head_s_gradient() -> None:
    frozen = ["tuning.embeddings=frozen", "tuning.head=frozen"]
    hidden = 1024 * 4096 * 2 * (3 + 2)
    moments = _moments(*frozen, "seq_len=1024", micro_batch_size=1)
    assert moments["loss"]["logits"] == 1024 * 55_296 * 2 + hidden
    # 3.6 GB of logits are taken in chunks of at most 256 MiB; the head's gradient adds up in float32.
    long_rows = _moments("seq_len=16384", micro_batch_size=2)
    logits = 32_768 * 55_296 * 2
    chunk = logits / -(-logits // 2**28)
    assert chunk <= 2**28
    assert long_rows["loss"]["logits"] == pytest.approx(chunk + 4 * EMBEDDINGS + 32 * hidden)


def test_gradients_that_overlap_a_partition_are_kept_completely() -> None:
    assert kept_of((10, 10, 10), 1) == 30
    assert kept_of((10, 10, 10), 2) == 20
    assert kept_of((10, 10), 2) == 10
    assert kept_of((100,), 4) == 100


def test_the_memory_line_of_a_run_has_the_peak_and_its_items() -> None:
    config = app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=1", "zero=1", "seq_len=65536"])
    text = memory.format_memory(tiny_model("llama", num_key_value_heads=2), config, Precision.fp32, 1, 1)
    assert text.startswith("planned peak 0.")
    assert "GiB per rank, without libraries, phase: " in text
    assert "activations 0." in text


def test_the_measured_peak_excludes_memory_resident_before(monkeypatch: pytest.MonkeyPatch) -> None:
    before = resident_bytes()
    assert before > 2**27
    monkeypatch.setattr(measured_memory, "resident_bytes", lambda: before + 3 * 2**29)
    assert format_peak(before) == "measured peak 1.50 GiB per rank, without libraries"
