"""The choices of a plan and their order, its estimates of time and disk, and refused configurations."""

import json
from pathlib import Path

import pytest
from plans import plan_of
from samples import ENGLISH

from fireflyds import app
from fireflyds.config import PlanConfig, Precision
from fireflyds.errors import UserError
from fireflyds.metrics.flops import peak_flops
from fireflyds.planner import plan, plan_report, search
from fireflyds.planner.plan import TrainingPlan

BODY, EMBEDDINGS = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 55_296 * 4096
FULL = ["tuning=full", "tuning.embeddings=all", "tuning.head=all", "optim=adamw", "hardware=bf16", "zero=1"]


def _config(*overrides: str) -> PlanConfig:
    return app.compose("plan", ["experiment=firefly_llama2_7b_ext_cpt_qlora", "optim.steps=10", *overrides])


def _plan(*overrides: str) -> TrainingPlan:
    return plan_of(_config(*overrides))


def test_every_stage_offloading_and_valid_micro_batch_is_listed_once() -> None:
    choices = _plan(*FULL, "cluster=a100x8", "global_batch_size=48", "micro_batch_size=1").choices
    offered = [
        (choice.placement.stage, choice.offload, choice.placement.micro_batch_size, choice.placement.checkpointing)
        for choice in choices
    ]
    layouts = [
        (0, "none"),
        (1, "none"),
        (1, "optimizer"),
        (2, "none"),
        (2, "optimizer"),
        (3, "none"),
        (3, "optimizer"),
        (3, "optimizer+param"),
    ]
    # Six rows a GPU.
    expected = [
        (*layout, micro, checkpointing)
        for layout in layouts
        for micro in (1, 2, 3, 6)
        for checkpointing in (False, True)
    ]
    assert sorted(offered) == sorted(expected)
    assert all(choice.placement.accumulation * choice.placement.micro_batch_size == 6 for choice in choices)


def test_choices_that_training_refuses_are_not_listed() -> None:
    # float16 has no stage 0, and bitsandbytes' states are not offloaded.
    choices = _plan("cluster=v100x4").choices
    assert {(choice.placement.stage, choice.offload) for choice in choices} == {(1, "none"), (2, "none"), (3, "none")}


def test_choices_are_sorted_by_fit_and_time() -> None:
    training_plan = _plan(*FULL, "cluster=a100x8", "global_batch_size=128", "micro_batch_size=1")
    fitting = [choice for choice in training_plan.choices if choice.fits]
    assert training_plan.fastest is training_plan.choices[0]
    assert [candidate.seconds for candidate in fitting] == sorted(candidate.seconds for candidate in fitting)
    assert [candidate.fits for candidate in training_plan.choices] == sorted(
        (candidate.fits for candidate in training_plan.choices), reverse=True
    )
    # 16 bytes x 6.9 billion do not fit 80 GB; sharded states do.
    assert {candidate.placement.stage for candidate in fitting} == {1, 2, 3}
    stage0 = next(candidate for candidate in training_plan.choices if candidate.placement.stage == 0)
    assert stage0.why_not.endswith("GiB needed, 74.4 GiB available per GPU")
    assert not training_plan.fastest.placement.checkpointing


def test_of_equally_fast_choices_the_least_sharded_is_preferred() -> None:
    training_plan = _plan(*FULL, "cluster=h200", "model=llama2_7b_ext", "model.architecture.num_hidden_layers=4")
    fastest = training_plan.fastest
    assert (fastest.placement.stage, fastest.offload, fastest.placement.checkpointing) == (0, "none", False)


def test_the_report_without_a_fitting_choice_describes_the_configured_one() -> None:
    training_plan = _plan(*FULL, "cluster=h200", "cluster.gpu_memory_gib=12", "cluster.host_memory_gib=64")
    assert training_plan.fastest is None
    assert training_plan.best is training_plan.own
    report = plan_report.format_plan(training_plan, [])
    assert (
        "fastest: nothing fits. Give more or larger GPUs (cluster.*), or try tuning=qlora, a shorter seq_len" in report
    )
    assert "as configured (zero=1, offload none, micro_batch_size=6, without checkpointing): does not fit: " in report
    assert plan_report.as_json(training_plan, [])["fastest"] is None


def test_step_time_is_flops_over_achieved_flops() -> None:
    training_plan = _plan(*FULL, "cluster=h200", "global_batch_size=6")
    tokens, pairs = 6 * 1024, 6 * 1024 * 1025 / 2
    assert training_plan.work.flops == 6 * (BODY + EMBEDDINGS) * tokens + 32 * 12 * 4096 * pairs
    assert training_plan.work.recomputed == pytest.approx(2 * BODY * tokens + 32 * 4 * 4096 * pairs)
    assert training_plan.peak == 989e12
    launches = 32 * search.LAUNCH_SECONDS
    assert training_plan.own.seconds == pytest.approx(training_plan.work.flops / (0.4 * 989e12) + launches)
    checkpointed = next(
        choice
        for choice in training_plan.choices
        if (choice.placement.checkpointing, choice.placement.stage, choice.placement.accumulation, choice.offload)
        == (True, 1, 1, "none")
    )
    flops = training_plan.work.flops + training_plan.work.recomputed
    assert checkpointed.seconds == pytest.approx(flops / (0.4 * 989e12) + launches * 4 / 3)
    report = plan_report.as_json(training_plan, [])
    assert report["hours"] == pytest.approx(training_plan.best.seconds * 10 / 3600)
    assert report["tokens"] == 10 * tokens
    assert report["flops"] == 10 * training_plan.work.flops


def test_communication_volume_equals_that_of_ring_algorithms() -> None:
    training_plan = _plan(*FULL, "cluster=a100x8", "global_batch_size=32", "micro_batch_size=2")
    trained_bytes = 2 * training_plan.shape.trained
    bytes_by_stage = {
        (choice.placement.stage): search.communication_bytes(training_plan.shape, Precision.bf16, choice.placement)
        for choice in training_plan.choices
        if choice.offload == "none" and choice.placement.micro_batch_size == 2
    }
    # Two micro-batches of two rows a GPU; seven eighths of everything leave it.
    assert bytes_by_stage == {
        0: trained_bytes * 2 * 7 / 8,
        1: trained_bytes * 3 * 7 / 8,
        2: trained_bytes * 5 * 7 / 8,
        3: trained_bytes * 2 * 3 * 7 / 8,
    }


def test_checkpoint_size_counts_masters_and_states_of_trained_parameters() -> None:
    training_plan = _plan(*FULL)
    trained = training_plan.shape.trained
    assert plan.checkpoint_bytes(training_plan.shape) == 12 * trained
    adapter_plan = _plan()
    assert adapter_plan.shape.trained == 612_892_672
    assert plan.checkpoint_bytes(adapter_plan.shape) == 12 * 612_892_672
    config = _config("checkpoint.every=100", "checkpoint.keep=2")
    assert plan.disk_bytes(5.0, config, 150) == 10.0
    assert plan.disk_bytes(5.0, config, 1000) == 15.0
    assert plan.disk_bytes(5.0, config, None) == 15.0


def test_without_data_the_plan_notes_its_assumptions() -> None:
    summary = plan.summarize_data(_config("optim.steps=null", "optim.epochs=2"), None)
    assert (summary.steps, summary.lengths, summary.labelled_share) == (None, [1024], 1)
    assert summary.note.startswith("note: no data= given: a row is assumed to be one document of seq_len=1024")
    assert summary.note.endswith("the steps of optim.epochs=2 are not known without data")
    assert plan.summarize_data(_config("data=stores/none"), None).note.startswith(
        "note: data.store=stores/none does not exist"
    )


def test_invalid_cluster_settings_are_refused() -> None:
    for overrides, message in (
        (
            ["cluster=v100x4", "hardware=bf16"],
            "hardware.precision=bf16: cluster.gpu=V100 has no bf16. Use hardware.precision=fp16",
        ),
        (
            ["cluster=h200", "cluster.gpu=Z9"],
            "cluster.gpu=Z9: its peak in fp16 is not known. Give hardware.peak_tflops=<TFLOP/s>, or one of A10, ",
        ),
        (
            ["cluster=a100x8", "global_batch_size=12", "micro_batch_size=1"],
            "global_batch_size=12: must be a multiple of 8 GPUs",
        ),
        (["cluster=a100x8", "micro_batch_size=4", "zero=2"], "micro_batch_size=4"),
        (["cluster.mfu=40"], "cluster.mfu=40.0: is a share of the peak, at most 1"),
        (["cluster.nodes=0"], "cluster.nodes=0: must be at least 1"),
    ):
        with pytest.raises(UserError, match=message.replace("(", r"\(").split("=<")[0]):
            _plan(*overrides)
    assert plan.cluster_precision(_config("cluster=v100x4", "hardware.precision=auto")) is Precision.fp16
    assert plan.cluster_precision(_config("cluster=h200", "hardware.precision=auto")) is Precision.bf16


@pytest.mark.parametrize("name", sorted(path.stem for path in (app.CONF / "cluster").glob("*.yaml")))
def test_every_cluster_has_gpus_whose_peak_is_known_or_is_refused(name: str) -> None:
    config = _config(f"cluster={name}")
    if name.startswith(("slurm", "local")):
        with pytest.raises(UserError, match="is not set; a plan needs cluster.gpu"):
            config.cluster.require_machine()
        return
    config.cluster.require_machine()
    assert peak_flops(config.cluster.gpu, Precision.fp16, config.hardware.peak_tflops)
    assert config.cluster.host_memory_gib > config.cluster.gpu_memory_gib / 2


@pytest.mark.slow
def test_planned_steps_tokens_and_disk_equal_those_of_the_run(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    (tmp_path / "en.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    verb("prepare", "data=en.txt", f"tokenizer={base_tokenizer}", "out=en", "workers=1")
    architecture = (
        "{model_type: llama, hidden_size: 256, intermediate_size: 512, num_hidden_layers: 2, num_attention_heads: 4, "
        "num_key_value_heads: 4, max_position_embeddings: 256, tie_word_embeddings: false}"
    )
    overrides = [
        "model=at_path",
        "model.init=scratch",
        f"model.tokenizer={base_tokenizer}",
        f"model.architecture={architecture}",
        "data=en",
        "seq_len=128",
        "micro_batch_size=1",
        "global_batch_size=4",
        "optim.epochs=1",
        "checkpoint.every=1000",
    ]
    for name, options in (("full", ["tuning=full", "zero=2"]), ("lora", ["tuning=lora", "zero=1"])):
        verb("train", f"run={name}", *overrides, *options, "hardware=fp32")
        one_gpu = ["cluster=cpu", "cluster.gpus_per_node=1", "hardware=fp32", "format=json"]
        report = json.loads(verb("plan", *overrides, *options, *one_gpu).stdout)
        last_row = json.loads((tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert report["steps"] == last_row["step"]
        assert report["tokens"] == pytest.approx(last_row["tokens"], rel=0.05)
        assert report["own"]["fits"]
        checkpoint = next((tmp_path / "runs" / name / "checkpoints").glob("step-*"))
        written = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        assert report["disk_per_checkpoint"] == pytest.approx(written, rel=0.15), name
