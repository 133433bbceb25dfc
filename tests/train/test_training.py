"""Two ranks train tiny models: the same losses at every ZeRO stage, what is kept, what the optimizers do, float16."""

import math
from pathlib import Path

import pytest
import torch
from grid import case, near, run_cases
from transformers import AutoModelForCausalLM

from fireflyds.checkpoint import init_from
from fireflyds.testing.models import save_tiny_llama

STAGES = (0, 1, 2, 3)
NEW_ROWS = ["tuning.embeddings=new_rows", "tuning.head=new_rows"]
FP16 = [
    "hardware.precision=fp16",
    "hardware.initial_scale_power=8",
    "hardware.hysteresis=1",
    "hardware.loss_scale_window=2",
    "hardware.min_loss_scale=64",
]
NUM_ADAPTED = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("cases")
    save_tiny_llama(made / "base", base_vocab_size=40)
    save_tiny_llama(made / "tied", base_vocab_size=40, tie_word_embeddings=True)
    save_tiny_llama(made / "large", vocab_size=55_296, hidden_size=32, intermediate_size=32, base_vocab_size=32_000)
    return made


@pytest.fixture(scope="module")
def found(folder: Path) -> dict:
    base, tied = folder / "base", folder / "tied"
    cases = {}
    for stage in STAGES:
        for tuning, rows in (("lora", NEW_ROWS), ("qlora", []), ("full", NEW_ROWS)):
            cases[f"{tuning} {stage}"] = case(base, tuning, stage, *rows, run_dir=str(folder / f"{tuning}-{stage}"))
        cases[f"tied full {stage}"] = case(tied, "full", stage, steps=1, run_dir=str(folder / f"tied-full-{stage}"))
        cases[f"tied {stage}"] = case(tied, "lora", stage, *NEW_ROWS, run_dir=str(folder / f"tied-{stage}"))
        cases[f"muon {stage}"] = case(base, "full", stage, "optim=muon", "optim.lr=1e-2", "optim.weight_decay=0.1")
    for stage in (1, 2, 3):
        cases[f"scale {stage}"] = case(base, "lora", stage, *FP16, steps=8, overflow=[2, 3])
        cases[f"least {stage}"] = case(base, "lora", stage, *FP16, steps=9, overflow=[2, 3, 4, 5, 6])
    again = "hardware.gradient_checkpointing=true"
    for stage in STAGES:
        cases[f"dora {stage}"] = case(base, "dora", stage)
        cases[f"dora again {stage}"] = case(base, "dora", stage, again)
        cases[f"qlora again {stage}"] = case(base, "qlora", stage, again)
        cases[f"tied again {stage}"] = case(tied, "lora", stage, *NEW_ROWS, again)
    for stage in (0, 2, 3):
        kept = str(folder / f"bf16-{stage}")
        cases[f"bf16 {stage}"] = case(base, "qlora", stage, "hardware.precision=bf16", run_dir=kept)
    for optim in ("adamw", "paged_adamw_32bit", "adamw_8bit"):
        cases[optim] = case(base, "full", 2, f"optim={optim}", "optim.lr=1e-2", "optim.betas=[0.9,0.95]")
    paged = ["optim=paged_adamw_32bit", "optim.lr=1e-2", "optim.betas=[0.9,0.95]"]
    cases["first half"] = case(base, "full", 2, *paged, steps=2, run_dir=str(folder / "half"))
    cases["second half"] = case(base, "full", 2, *paged, steps=2, resume=str(folder / "half"))
    cases["8 bit"] = case(base, "qlora", 2, "tuning.bits=8")
    cases["groups"] = case(
        base,
        "lora",
        2,
        "tuning.embeddings=all",
        "tuning.head=all",
        "tuning.loraplus_lr_ratio=16",
        "optim.embeddings.lr=2e-3",
        "optim.head.lr=0",
        run_dir=str(folder / "groups"),
    )
    cases["noise"] = case(base, "full", 2, "optim.neftune_noise_alpha=30")
    cases["lora fp32"] = case(base, "lora", 2)
    for stage in STAGES:
        short = "recovery.max_skipped=2"
        cases[f"nan {stage}"] = case(base, "full", stage, short, nan_at=3)
        cases[f"spoilt {stage}"] = case(base, "full", stage, *NEW_ROWS, short, spoilt_gradients=[2])
        cases[f"spoilt twice {stage}"] = case(base, "full", stage, *NEW_ROWS, short, spoilt_gradients=[2, 3])
    for name, precision in (("large fp16", "fp16"), ("large fp32", "fp32")):
        chosen = ["tuning.embeddings=frozen", "tuning.head=all", f"hardware.precision={precision}"]
        cases[name] = case(folder / "large", "embeddings", 2, *chosen, steps=3, run_dir=str(folder / name))
    return run_cases(folder, cases)


@pytest.mark.parametrize("name", ["lora", "qlora", "full", "tied", "muon", "dora"])
def test_losses_are_equal_at_every_zero_stage(found: dict, name: str) -> None:
    wanted = found[f"{name} 0"]["losses"]
    assert wanted[-1] < wanted[0]
    for stage in STAGES:
        assert found[f"{name} {stage}"]["error"] is None
        # Muon's orthogonalisation magnifies rounding.
        near(found[f"{name} {stage}"]["losses"], wanted, 1e-4 if name == "muon" else 2e-6)


@pytest.mark.parametrize("name", ["qlora", "tied", "dora"])
def test_recomputed_activations_change_nothing_at_any_stage(found: dict, name: str) -> None:
    for stage in STAGES:
        assert found[f"{name} again {stage}"]["error"] is None
        near(found[f"{name} again {stage}"]["losses"], found[f"{name} {stage}"]["losses"], 2e-6)


def test_quantised_training_in_bf16_is_equal_at_every_stage(found: dict) -> None:
    for stage in (2, 3):
        near(found[f"bf16 {stage}"]["losses"], found["bf16 0"]["losses"], 2e-3)
    near(found["bf16 0"]["losses"], found["qlora 0"]["losses"], 1e-2)
    near(found["8 bit"]["losses"], found["qlora 2"]["losses"], 2e-2)
    assert found["8 bit"]["losses"][-1] < found["8 bit"]["losses"][0]


def test_what_is_kept_of_bf16_training_is_in_float32(found: dict, folder: Path) -> None:
    assert found
    kept = [
        init_from.read_trainable_weights(next((folder / f"bf16-{s}" / "checkpoints").glob("step-*"))) for s in (0, 2, 3)
    ]
    for each in kept:
        for name, tensor in each.adapters.items():
            assert tensor.dtype is torch.float32
            assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name} was rounded"
            # Where a gradient is nothing but rounding, each of the four steps of Adam may go either way by lr=1e-2.
            torch.testing.assert_close(tensor, kept[1].adapters[name], rtol=0.05, atol=8e-2)


def test_optimizer_states_hold_the_new_rows_alone(found: dict) -> None:
    """Two moments of four bytes for every number that trains, spread over two ranks from stage 1 on."""
    rows = 20 * 64
    for name, numbers in (("lora", NUM_ADAPTED + 2 * rows), ("tied", NUM_ADAPTED + rows), ("qlora", NUM_ADAPTED)):
        assert [found[f"{name} {stage}"]["state_bytes"] for stage in STAGES] == [8 * numbers] + [4 * numbers] * 3


@pytest.mark.parametrize("name", ["lora", "tied", "full", "qlora"])
def test_every_stage_keeps_the_same_learnt_tensors(found: dict, folder: Path, name: str) -> None:
    assert found
    kept = [
        init_from.read_trainable_weights(next((folder / f"{name}-{stage}" / "checkpoints").glob("step-*")))
        for stage in STAGES
    ]
    rows = {"lora": 2, "tied": 1, "full": 2, "qlora": 0}[name]
    assert kept[0].first_rows == dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"][:rows], 40)
    assert len(kept[0].adapters) == (0 if name == "full" else 28)
    if name == "full":
        assert len(kept[0].weights) == 2 + 1 + 2 * 9
    assert all(kept[0].weights[key].shape == (20, 64) for key in kept[0].first_rows)
    for other in kept[1:]:
        assert other.adapters.keys() == kept[0].adapters.keys()
        assert other.weights.keys() == kept[0].weights.keys()
        for (key, tensor), (_, expected) in zip(other.items(), kept[0].items(), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-4, msg=key)


def test_a_checkpoint_holds_adapters_once(found: dict, folder: Path) -> None:
    assert found["lora 2"]["error"] is None
    checkpoint = next((folder / "lora-2" / "checkpoints").glob("step-*"))
    files = {file.name: file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()}
    # Weights and two moments of four bytes each; names and the texts beside take some thousands.
    numbers = NUM_ADAPTED + 2 * 20 * 64
    assert sum(files.values()) < 12 * numbers + 60_000
    assert "adapter_model.safetensors" not in files


@pytest.mark.parametrize("stage", STAGES)
def test_a_tied_model_that_trained_whole_is_read_back_whole(found: dict, folder: Path, stage: int) -> None:
    assert found[f"tied full {stage}"]["error"] is None
    model = AutoModelForCausalLM.from_pretrained(folder / "tied")
    before = model.get_input_embeddings().weight.clone()
    init_from.restore_weights(model, folder, next((folder / f"tied-full-{stage}" / "checkpoints").glob("step-*")))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not torch.equal(model.get_input_embeddings().weight, before)


def test_the_optimizers_agree_where_they_should(found: dict) -> None:
    near(found["paged_adamw_32bit"]["losses"], found["adamw"]["losses"], 1e-4)
    # States of 8 bit differ by rounding; groups smaller than 4096 numbers keep 32.
    near(found["adamw_8bit"]["losses"], found["adamw"]["losses"], 2e-2)
    assert found["adamw_8bit"]["state_bytes"] < found["adamw"]["state_bytes"] / 2
    assert found["muon 2"]["losses"] != found["full 2"]["losses"]


def test_a_paged_optimizer_goes_on_where_it_was(found: dict) -> None:
    whole = found["paged_adamw_32bit"]["losses"]
    assert found["first half"]["losses"] + found["second half"]["losses"] == whole


def test_groups_have_their_own_learning_rates(found: dict, folder: Path) -> None:
    assert found["groups"]["lrs"][0] == [1e-2, 16e-2, 2e-3, 0.0]
    kept = init_from.read_trainable_weights(next((folder / "groups" / "checkpoints").glob("step-*"))).weights
    start = AutoModelForCausalLM.from_pretrained(folder / "base").state_dict()
    assert torch.equal(kept["lm_head.weight"], start["lm_head.weight"])
    assert not torch.equal(kept["model.embed_tokens.weight"], start["model.embed_tokens.weight"])


def test_noise_on_embeddings_changes_training_alone(found: dict) -> None:
    clean, noisy = found["adamw"]["losses"], found["noise"]["losses"]
    assert all(abs(a - b) > 1e-4 for a, b in zip(clean, noisy, strict=True))
    assert all(math.isfinite(loss) for loss in noisy)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_loss_scale_falls_and_recovers(found: dict, stage: int) -> None:
    seen = found[f"scale {stage}"]
    assert seen["error"] is None
    # As each step begins: halved by the overflows of steps 2 and 3, doubled again after every two good steps.
    assert seen["scales"][:4] == [256, 256, 128, 64]
    assert seen["scales"][-1] >= 128
    assert seen["skipped"] == [0, 1, 2, 2, 2, 2, 2, 2]
    assert seen["losses"][-1] < seen["losses"][0]
    # The norm is without the scale. (At stage 3 DeepSpeed divides by the new one in the steps that double it.)
    near(seen["norms"][:1], found["lora fp32"]["norms"][:1], 2e-2)
    near(seen["norms"][3:5], found["scale 2"]["norms"][3:5], 2e-2)
    near(seen["losses"], found["scale 2"]["losses"], 5e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_at_the_least_scale_ends_the_run_and_is_named(found: dict, stage: int) -> None:
    seen = found[f"least {stage}"]
    assert seen["scales"] == [256, 256, 128]
    assert (
        "step 4: hardware.min_loss_scale=64: a gradient overflows float16 at the minimum loss scale;" in seen["error"]
    )
    assert "the gradient of the output of model" in seen["error"]
    assert "in micro-batch 1 of rank 0" in seen["error"]


@pytest.mark.parametrize("stage", STAGES)
def test_steps_that_are_not_finite_are_skipped_and_then_end_the_run_by_name(found: dict, stage: int) -> None:
    """Two good steps, then a layer that gives no numbers: two bad ones in a row are one too many."""
    seen = found[f"nan {stage}"]
    assert [math.isfinite(loss) for loss in seen["losses"]] == [True, True, False]
    assert seen["skipped"] == [0, 0, 1]
    assert "step 4: recovery.max_skipped=2: the loss is nan; non-finite steps in a row: 2;" in seen["error"]
    assert "the output of model.layers.1.mlp.down_proj, in micro-batch 1 of rank 0" in seen["error"]
    assert "which holds documents of row 0 of step 3" in seen["error"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_whose_gradients_alone_are_not_finite_changes_nothing(found: dict, stage: int) -> None:
    """Gradients of step 2 are spoilt behind a finite loss: the weights stay, and step 3 is what step 2 would have
    been."""
    seen, whole = found[f"spoilt {stage}"], found[f"full {stage}"]
    assert seen["skipped"] == [0, 1, 1, 1]
    near(seen["losses"][:2], whole["losses"][:2], 2e-6)
    assert seen["parameters"][0] == seen["parameters"][1] != seen["parameters"][2]
    twice = found[f"spoilt twice {stage}"]
    assert "step 3: recovery.max_skipped=2: the gradients' norm is" in twice["error"]
    assert "the gradient of" in twice["error"]


def test_no_gradient_dies_in_float16_with_a_large_vocabulary(found: dict, folder: Path) -> None:
    """The probabilities of 55,296 tokens are below what float16 can hold; every row of the head must move all the
    same."""
    near(found["large fp16"]["losses"], found["large fp32"]["losses"], 2e-3)
    start = AutoModelForCausalLM.from_pretrained(folder / "large").state_dict()["lm_head.weight"]
    moved = []
    for name in ("large fp16", "large fp32"):
        kept = init_from.read_trainable_weights(next((folder / name / "checkpoints").glob("step-*"))).weights[
            "lm_head.weight"
        ]
        moved.append((kept - start).abs() > 1e-4)
    assert moved[1].float().mean() > 0.98
    assert moved[0].float().mean() > 0.98 * moved[1].float().mean()


@pytest.mark.parametrize("name", ["lora 0", "lora 3", "full 2", "bf16 3"])
def test_domains_of_all_ranks_make_up_the_step(found: dict, name: str) -> None:
    """Documents of 19, 0 and 10 learned tokens in each of 4 rows; every token stands for 3 bytes."""
    for number, (loss, extra) in enumerate(zip(found[name]["losses"], found[name]["extra"], strict=True)):
        rows = [number % 3 * 4 + row for row in range(4)]
        learned = {"zh": 4 * 19 + 10 * sum(row % 2 == 0 for row in rows), "en": 10 * sum(row % 2 for row in rows)}
        assert {key for key in extra if key.startswith("loss/")} == {"loss/zh", "loss/en"}
        total = sum(extra[f"loss/{domain}"] * tokens for domain, tokens in learned.items())
        near([total / sum(learned.values())], [loss], 1e-6)
        for domain in learned:
            near([extra[f"bits_per_byte/{domain}"]], [extra[f"loss/{domain}"] / math.log(2) / 3], 1e-9)
        assert extra["fill"] == 1
        assert extra["slowest_rank"] in (0, 1)
        assert 0 <= extra["step_seconds_spread"] < extra["slowest_seconds"]
        assert extra["mfu"] == pytest.approx(extra["tflops_per_gpu"])
        assert extra["tokens_per_second_per_gpu"] * 29 / 32 == pytest.approx(extra["learned_tokens_per_second_per_gpu"])


def test_ranks_and_stages_agree_on_every_domain(found: dict) -> None:
    for key in ("loss/zh", "bits_per_byte/en", "flops"):
        near([step[key] for step in found["lora 0"]["extra"]], [step[key] for step in found["lora 3"]["extra"]], 1e-4)


def test_every_group_tells_its_learning_rate(found: dict) -> None:
    for step, lrs in zip(found["groups"]["extra"], found["groups"]["lrs"], strict=True):
        named = {key.removeprefix("lr/"): value for key, value in step.items() if key.startswith("lr/")}
        assert list(named) == ["lora_A", "lora_B", "embeddings", "head"]
        assert list(named.values()) == lrs
        assert named["lora_B"] == pytest.approx(16 * named["lora_A"])
