"""Two ranks train tiny models: the same losses at every ZeRO stage, checkpoints, optimizers, float16."""

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
BF16 = "hardware.precision=bf16"
NUM_ADAPTED = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cases")
    save_tiny_llama(path / "base", base_vocab_size=40)
    save_tiny_llama(path / "tied", base_vocab_size=40, tie_word_embeddings=True)
    save_tiny_llama(path / "large", vocab_size=55_296, hidden_size=32, intermediate_size=32, base_vocab_size=32_000)
    return path


@pytest.fixture(scope="module")
def results(folder: Path) -> dict:
    base, tied = folder / "base", folder / "tied"
    cases = {}
    for stage in STAGES:
        for tuning, options in (("lora", NEW_ROWS), ("qlora", []), ("full", NEW_ROWS)):
            cases[f"{tuning} {stage}"] = case(base, tuning, stage, *options, run_dir=str(folder / f"{tuning}-{stage}"))
        cases[f"tied full {stage}"] = case(tied, "full", stage, steps=1, run_dir=str(folder / f"tied-full-{stage}"))
        cases[f"tied {stage}"] = case(tied, "lora", stage, *NEW_ROWS, run_dir=str(folder / f"tied-{stage}"))
        cases[f"muon {stage}"] = case(base, "full", stage, "optim=muon", "optim.lr=1e-2", "optim.weight_decay=0.1")
    for stage in (1, 2, 3):
        cases[f"scale {stage}"] = case(base, "lora", stage, *FP16, steps=8, overflow=[2, 3])
        cases[f"least {stage}"] = case(base, "lora", stage, *FP16, steps=9, overflow=[2, 3, 4, 5, 6])
    checkpointing = "hardware.gradient_checkpointing=true"
    for stage in STAGES:
        cases[f"dora {stage}"] = case(base, "dora", stage)
        cases[f"dora again {stage}"] = case(base, "dora", stage, checkpointing)
        cases[f"qlora again {stage}"] = case(base, "qlora", stage, checkpointing)
        cases[f"tied again {stage}"] = case(tied, "lora", stage, *NEW_ROWS, checkpointing)
    for stage in (0, 2, 3):
        run_dir = str(folder / f"bf16-{stage}")
        cases[f"bf16 {stage}"] = case(base, "qlora", stage, BF16, run_dir=run_dir)
    for optim in ("adamw", "paged_adamw_32bit", "adamw_8bit"):
        cases[optim] = case(base, "full", 2, f"optim={optim}", "optim.lr=1e-2", "optim.betas=[0.9,0.95]")
    paged_options = ["optim=paged_adamw_32bit", "optim.lr=1e-2", "optim.betas=[0.9,0.95]"]
    cases["first half"] = case(base, "full", 2, *paged_options, steps=2, run_dir=str(folder / "half"))
    cases["second half"] = case(base, "full", 2, *paged_options, steps=2, resume=str(folder / "half"))
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
        cases[f"waits {stage}"] = case(base, "lora", stage, BF16, steps=3, rows=8, host_waits=True)
    cases["waits of a layer"] = case(base, "full", 2, steps=2, rows=8, host_waits=True, reads_outputs=True)
    for stage in STAGES:
        max_skipped = "recovery.max_skipped=2"
        cases[f"nan {stage}"] = case(base, "full", stage, max_skipped, nan_at=3)
        cases[f"spoilt {stage}"] = case(base, "full", stage, *NEW_ROWS, max_skipped, spoilt_gradients=[2])
        cases[f"spoilt twice {stage}"] = case(base, "full", stage, *NEW_ROWS, max_skipped, spoilt_gradients=[2, 3])
    for name, precision in (("large fp16", "fp16"), ("large fp32", "fp32")):
        options = ["tuning.embeddings=frozen", "tuning.head=all", f"hardware.precision={precision}"]
        cases[name] = case(folder / "large", "embeddings", 2, *options, steps=3, run_dir=str(folder / name))
    return run_cases(folder, cases)


@pytest.mark.parametrize("name", ["lora", "qlora", "full", "tied", "muon", "dora"])
def test_losses_are_equal_at_every_zero_stage(results: dict, name: str) -> None:
    expected = results[f"{name} 0"]["losses"]
    assert expected[-1] < expected[0]
    for stage in STAGES:
        assert results[f"{name} {stage}"]["error"] is None
        # Muon's orthogonalisation magnifies rounding.
        near(results[f"{name} {stage}"]["losses"], expected, 1e-4 if name == "muon" else 2e-6)


@pytest.mark.parametrize("name", ["qlora", "tied", "dora"])
def test_gradient_checkpointing_gives_the_same_losses_at_every_stage(results: dict, name: str) -> None:
    for stage in STAGES:
        assert results[f"{name} again {stage}"]["error"] is None
        near(results[f"{name} again {stage}"]["losses"], results[f"{name} {stage}"]["losses"], 2e-6)


def test_quantised_training_in_bf16_is_equal_at_every_stage(results: dict) -> None:
    for stage in (2, 3):
        near(results[f"bf16 {stage}"]["losses"], results["bf16 0"]["losses"], 2e-3)
    near(results["bf16 0"]["losses"], results["qlora 0"]["losses"], 1e-2)
    near(results["8 bit"]["losses"], results["qlora 2"]["losses"], 2e-2)
    assert results["8 bit"]["losses"][-1] < results["8 bit"]["losses"][0]


def test_bf16_training_saves_float32_weights(results: dict, folder: Path) -> None:
    assert results
    checkpoints = [
        init_from.read_trainable_weights(next((folder / f"bf16-{s}" / "checkpoints").glob("step-*"))) for s in (0, 2, 3)
    ]
    for checkpoint in checkpoints:
        for name, tensor in checkpoint.adapters.items():
            assert tensor.dtype is torch.float32
            assert not torch.equal(tensor, tensor.bfloat16().float()), f"{name} was rounded"
            # Where a gradient is nothing but rounding, each of the four steps of Adam may go either way by lr=1e-2.
            torch.testing.assert_close(tensor, checkpoints[1].adapters[name], rtol=0.05, atol=8e-2)


def test_optimizer_states_hold_only_trained_parameters(results: dict) -> None:
    """Two moments of four bytes per trained parameter, sharded over two ranks from stage 1 on."""
    rows = 20 * 64
    for name, num_trained in (("lora", NUM_ADAPTED + 2 * rows), ("tied", NUM_ADAPTED + rows), ("qlora", NUM_ADAPTED)):
        assert [results[f"{name} {stage}"]["state_bytes"] for stage in STAGES] == [8 * num_trained] + [
            4 * num_trained
        ] * 3


@pytest.mark.parametrize("name", ["lora", "tied", "full", "qlora"])
def test_every_stage_saves_the_same_trained_tensors(results: dict, folder: Path, name: str) -> None:
    assert results
    checkpoints = [
        init_from.read_trainable_weights(next((folder / f"{name}-{stage}" / "checkpoints").glob("step-*")))
        for stage in STAGES
    ]
    rows = {"lora": 2, "tied": 1, "full": 2, "qlora": 0}[name]
    assert checkpoints[0].first_rows == dict.fromkeys(["model.embed_tokens.weight", "lm_head.weight"][:rows], 40)
    assert len(checkpoints[0].adapters) == (0 if name == "full" else 28)
    if name == "full":
        assert len(checkpoints[0].weights) == 2 + 1 + 2 * 9
    assert all(checkpoints[0].weights[key].shape == (20, 64) for key in checkpoints[0].first_rows)
    for other in checkpoints[1:]:
        assert other.adapters.keys() == checkpoints[0].adapters.keys()
        assert other.weights.keys() == checkpoints[0].weights.keys()
        for (key, tensor), (_, expected) in zip(other.items(), checkpoints[0].items(), strict=True):
            torch.testing.assert_close(tensor, expected, rtol=1e-3, atol=1e-4, msg=key)


def test_a_checkpoint_holds_adapters_once(results: dict, folder: Path) -> None:
    assert results["lora 2"]["error"] is None
    checkpoint = next((folder / "lora-2" / "checkpoints").glob("step-*"))
    files = {file.name: file.stat().st_size for file in checkpoint.rglob("*") if file.is_file()}
    # Weights and two moments of four bytes each; names and text files take some thousand bytes.
    num_trained = NUM_ADAPTED + 2 * 20 * 64
    assert sum(files.values()) < 12 * num_trained + 60_000
    assert "adapter_model.safetensors" not in files


@pytest.mark.parametrize("stage", STAGES)
def test_a_fully_trained_tied_model_is_restored_completely(results: dict, folder: Path, stage: int) -> None:
    assert results[f"tied full {stage}"]["error"] is None
    model = AutoModelForCausalLM.from_pretrained(folder / "tied")
    before = model.get_input_embeddings().weight.clone()
    init_from.restore_weights(model, folder, next((folder / f"tied-full-{stage}" / "checkpoints").glob("step-*")))
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert not torch.equal(model.get_input_embeddings().weight, before)


def test_adamw_variants_give_the_same_losses(results: dict) -> None:
    near(results["paged_adamw_32bit"]["losses"], results["adamw"]["losses"], 1e-4)
    # States of 8 bit differ by rounding; groups smaller than 4096 numbers keep 32.
    near(results["adamw_8bit"]["losses"], results["adamw"]["losses"], 2e-2)
    assert results["adamw_8bit"]["state_bytes"] < results["adamw"]["state_bytes"] / 2
    assert results["muon 2"]["losses"] != results["full 2"]["losses"]


def test_a_paged_optimizer_resumes_with_the_same_losses(results: dict) -> None:
    expected = results["paged_adamw_32bit"]["losses"]
    assert results["first half"]["losses"] + results["second half"]["losses"] == expected


def test_groups_have_their_own_learning_rates(results: dict, folder: Path) -> None:
    assert results["groups"]["lrs"][0] == [1e-2, 16e-2, 2e-3, 0.0]
    weights = init_from.read_trainable_weights(next((folder / "groups" / "checkpoints").glob("step-*"))).weights
    base_weights = AutoModelForCausalLM.from_pretrained(folder / "base").state_dict()
    assert torch.equal(weights["lm_head.weight"], base_weights["lm_head.weight"])
    assert not torch.equal(weights["model.embed_tokens.weight"], base_weights["model.embed_tokens.weight"])


def test_neftune_noise_changes_the_losses(results: dict) -> None:
    losses, noisy_losses = results["adamw"]["losses"], results["noise"]["losses"]
    assert all(abs(a - b) > 1e-4 for a, b in zip(losses, noisy_losses, strict=True))
    assert all(math.isfinite(loss) for loss in noisy_losses)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_loss_scale_is_halved_by_overflows_and_grows_again(results: dict, stage: int) -> None:
    result = results[f"scale {stage}"]
    assert result["error"] is None
    # As each step begins: halved by the overflows of steps 2 and 3, doubled again after every two good steps.
    assert result["scales"][:4] == [256, 256, 128, 64]
    assert result["scales"][-1] >= 128
    assert result["skipped"] == [0, 1, 2, 2, 2, 2, 2, 2]
    assert result["losses"][-1] < result["losses"][0]
    # The norm is without the scale. (At stage 3 DeepSpeed divides by the new one in the steps that double it.)
    near(result["norms"][:1], results["lora fp32"]["norms"][:1], 2e-2)
    near(result["norms"][3:5], results["scale 2"]["norms"][3:5], 2e-2)
    near(result["losses"], results["scale 2"]["losses"], 5e-3)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_overflow_at_the_minimum_loss_scale_ends_the_run(results: dict, stage: int) -> None:
    result = results[f"least {stage}"]
    assert result["scales"] == [256, 256, 128]
    assert (
        "step 4: hardware.min_loss_scale=64: a gradient overflows float16 at the minimum loss scale;" in result["error"]
    )
    assert "the gradient of the output of model" in result["error"]
    assert "in micro-batch 1 of rank 0" in result["error"]


@pytest.mark.parametrize("stage", STAGES)
def test_nonfinite_steps_are_skipped_until_max_skipped_ends_the_run(results: dict, stage: int) -> None:
    """Two finite steps, then a layer that outputs NaN: the second non-finite step in a row ends the run."""
    result = results[f"nan {stage}"]
    assert [math.isfinite(loss) for loss in result["losses"]] == [True, True, False]
    assert result["skipped"] == [0, 0, 1]
    assert "step 4: recovery.max_skipped=2: the loss is nan; non-finite steps in a row: 2;" in result["error"]
    assert "the output of model.layers.1.mlp.down_proj, in micro-batch 1 of rank 0" in result["error"]
    assert "which holds documents of row 0 of step 3" in result["error"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_step_with_nonfinite_gradients_does_not_change_weights(results: dict, stage: int) -> None:
    """Gradients of step 2 are infinite while its loss is finite: weights do not change, and step 3 has the loss that
    step 2 of an undisturbed run has."""
    result, reference = results[f"spoilt {stage}"], results[f"full {stage}"]
    assert result["skipped"] == [0, 1, 1, 1]
    near(result["losses"][:2], reference["losses"][:2], 2e-6)
    assert result["parameters"][0] == result["parameters"][1] != result["parameters"][2]
    repeated = results[f"spoilt twice {stage}"]
    assert "step 3: recovery.max_skipped=2: the gradients' norm is" in repeated["error"]
    assert "the gradient of" in repeated["error"]


def test_float16_gradients_do_not_underflow_with_a_large_vocabulary(results: dict, folder: Path) -> None:
    """The probabilities of 55,296 tokens underflow in float16; every row of the head must still be updated."""
    near(results["large fp16"]["losses"], results["large fp32"]["losses"], 2e-3)
    base_head = AutoModelForCausalLM.from_pretrained(folder / "large").state_dict()["lm_head.weight"]
    updated = []
    for name in ("large fp16", "large fp32"):
        head = init_from.read_trainable_weights(next((folder / name / "checkpoints").glob("step-*"))).weights[
            "lm_head.weight"
        ]
        updated.append((head - base_head).abs() > 1e-4)
    assert updated[1].float().mean() > 0.98
    assert updated[0].float().mean() > 0.98 * updated[1].float().mean()


@pytest.mark.parametrize("name", ["lora 0", "lora 3", "full 2", "bf16 3"])
def test_domain_losses_of_all_ranks_sum_to_the_loss_of_the_step(results: dict, name: str) -> None:
    """Documents of 19, 0 and 10 learned tokens in each of 4 rows; every token stands for 3 bytes."""
    for index, (loss, extra) in enumerate(zip(results[name]["losses"], results[name]["extra"], strict=True)):
        rows = [index % 3 * 4 + row for row in range(4)]
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


def test_ranks_and_stages_agree_on_every_domain(results: dict) -> None:
    for key in ("loss/zh", "bits_per_byte/en", "flops"):
        near(
            [step[key] for step in results["lora 0"]["extra"]], [step[key] for step in results["lora 3"]["extra"]], 1e-4
        )


def test_every_group_logs_its_learning_rate(results: dict) -> None:
    for step, lrs in zip(results["groups"]["extra"], results["groups"]["lrs"], strict=True):
        logged_lrs = {key.removeprefix("lr/"): value for key, value in step.items() if key.startswith("lr/")}
        assert list(logged_lrs) == ["lora_A", "lora_B", "embeddings", "head"]
        assert list(logged_lrs.values()) == lrs
        assert logged_lrs["lora_B"] == pytest.approx(16 * logged_lrs["lora_A"])


@pytest.mark.parametrize("stage", STAGES)
def test_the_host_waits_for_no_micro_batch(results: dict, stage: int) -> None:
    # 8 rows are 4 micro-batches a rank. ZeRO-3 compares the order of the parameters over all ranks in its first step.
    waits = [(step, part, place) for step, part, place in results[f"waits {stage}"]["host_waits"] if part != "data"]
    assert not [wait for wait in waits if wait[1] in ("forward", "backward") and (stage < 3 or wait[0] > 0)]
    ours = [
        "accumulator.py:start_step",
        "engine.py:optimizer_step",
        "accumulator.py:reduce",
        "accumulator.py:finish_step",
    ]
    files = {place.partition(":")[0] for place in ours}
    for step in range(3):
        places = [place for number, part, place in waits if number == step and part not in ("forward", "backward")]
        assert [place for place in places if place.partition(":")[0] in files] == ours
        # DeepSpeed's: of the whole step, and of each of the two parameter groups.
        assert len(places) <= len(ours) + 2 + 2 * 2


def test_waits_of_a_layer_are_recorded(results: dict) -> None:
    waits = [tuple(wait[:2]) for wait in results["waits of a layer"]["host_waits"]]
    assert [waits.count((step, part)) for step in (0, 1) for part in ("forward", "backward")] == [4] * 4
