"""Costs of alternatives outside GPU memory: host memory, traffic, recomputation; and which alternatives are listed."""

import importlib.util
import json
from dataclasses import replace

import pytest
from plans import plan_of

from fireflyds import app
from fireflyds.config import PlanConfig, Precision
from fireflyds.planner import plan, plan_report, search
from fireflyds.planner.memory import GIB, Placement
from fireflyds.planner.plan import TrainingPlan

LAYERS, WIDTH, INNER, VOCAB = 2, 4096, 11008, 55_296
BODY = LAYERS * (4 * WIDTH**2 + 3 * WIDTH * INNER)
FULL = ["tuning=full", "tuning.embeddings=all", "tuning.head=all", "optim=adamw", "hardware=bf16"]
ON_CPU = ["tuning=full", "optim=adamw", "cluster=cpu", "hardware=cpu", "global_batch_size=4", "micro_batch_size=2"]


def _config(*overrides: str) -> PlanConfig:
    required = [
        "experiment=firefly_llama2_7b_ext_cpt_qlora",
        "optim.steps=10",
        f"model.architecture.num_hidden_layers={LAYERS}",
    ]
    return app.compose("plan", [*required, *overrides])


def _plan(*overrides: str) -> TrainingPlan:
    return plan_of(_config(*overrides))


def _layouts(training_plan: TrainingPlan) -> set[tuple[int, str]]:
    return {(choice.placement.stage, choice.offload) for choice in training_plan.choices}


def test_host_memory_includes_the_copy_of_a_background_checkpoint() -> None:
    overrides = [*FULL, "cluster=h200", "zero=1", "zero.offload_optimizer=cpu", "global_batch_size=6"]
    training_plan = _plan(*overrides)
    trained = training_plan.shape.trained
    # Masters, two states, float32 gradients and a copy of the weights in the model's format; of the first three a copy.
    assert training_plan.own.memory.host == (12 + 4 + 2) * trained
    assert training_plan.own.host_per_node == (18 + 12) * trained + 3 * GIB
    host_gib = (18 + 6) * trained / GIB + 3
    limited = _plan(*overrides, f"cluster.host_memory_gib={host_gib:.1f}")
    assert (
        limited.own.why_not
        == f"{training_plan.own.host_per_node / GIB:.0f} GiB needed, {host_gib:.1f} GiB available per host"
    )
    # Every rank saves its share.
    sharded = _plan(*FULL, "cluster=a100x8", "zero=1", "global_batch_size=48")
    assert sharded.own.memory.host_saving == 12 * trained / 8


def test_host_memory_on_the_cpu_includes_ranks_copies_and_libraries() -> None:
    training_plan = _plan(*ON_CPU, "zero=1")
    memory, trained = training_plan.own.memory, training_plan.shape.trained
    bytes_per_rank = memory.total + 12 * trained / 2 + search.CPU_LIBRARIES_GIB * GIB
    assert training_plan.own.host_per_node == pytest.approx(2 * bytes_per_rank)
    # Where training waits for the write, activations and gradients are freed by then.
    foreground = _plan(*ON_CPU, "zero=1", "checkpoint.background=false")
    resident = 4 * trained + 12 * trained / 2 + memory.items["fixed"]
    peak = max(memory.total, resident + 12 * trained / 2)
    assert foreground.own.host_per_node == pytest.approx(2 * (peak + search.CPU_LIBRARIES_GIB * GIB))
    assert foreground.own.host_per_node < training_plan.own.host_per_node


def test_cluster_gpu_cpu_is_case_insensitive() -> None:
    lower_case, upper_case = _plan(*ON_CPU, "zero=1"), _plan(*ON_CPU, "zero=1", "cluster.gpu=CPU")
    assert upper_case.own == lower_case.own
    assert upper_case.choices == lower_case.choices
    assert (
        plan.cluster_precision(_config("cluster=cpu", "cluster.gpu=CPU", "hardware.precision=auto")) is Precision.fp32
    )


def test_a_plan_for_cpus_reports_ranks_instead_of_gpus() -> None:
    report = plan_report.format_plan(_plan(*ON_CPU, "zero=1", "cluster.gpu_memory_gib=1"), [])
    assert "GPU" not in report
    assert "peak GiB per rank within a step" in report
    assert "GiB needed, 1.0 GiB available per rank" in report
    assert "nothing fits. Give more machines or memory (cluster.*)" in report


def test_zero_extra_does_not_reduce_the_alternatives() -> None:
    overrides = [*FULL, "cluster=a100x8", "zero=1", "global_batch_size=48"]
    training_plan = _plan(*overrides, "zero.extra={zero_optimization:{stage:1,offload_optimizer:{device:none}}}")
    assert _layouts(training_plan) == _layouts(_plan(*overrides))
    assert len(_layouts(training_plan)) == 8
    assert training_plan.own.fits
    assert training_plan.fastest is not None


def test_offload_traffic_of_gradient_accumulation() -> None:
    shape = _plan(*FULL, "cluster=h200", "zero=1", "global_batch_size=6").shape
    cluster = _config("cluster=h200", "cluster.host_link_gb_per_s=1").cluster
    update = shape.trained / search.CPU_ADAM_PER_SECOND

    def bytes_each(stage: int, accumulation: int, parameters: bool = False) -> float:
        placement = Placement(stage, True, parameters, 1, False, 1, accumulation)
        return (search.offload_seconds(shape, Precision.bf16, placement, cluster) - update) * 1e9 / shape.trained

    # float32 gradients down and weights up once a step.
    for accumulation in (1, 4):
        assert bytes_each(1, accumulation) == pytest.approx(4 + 2)
    assert bytes_each(2, 1) == pytest.approx(4 + 2)
    # The sum is written four times and read three times.
    assert bytes_each(2, 4) == pytest.approx(7 * 2 + 4 + 2)
    # At stage 3 it is read each time.
    assert bytes_each(3, 1) == pytest.approx(2 * 2 + 4 + 2)
    assert bytes_each(3, 4) == pytest.approx(8 * 2 + 4 + 2)
    # Weights offloaded to the host are fetched twice per micro-batch instead; nothing is frozen here.
    assert bytes_each(3, 4, parameters=True) == pytest.approx(8 * 2 + 4 + 2 * 4 * 2)


def test_recomputation_counts_only_blocks_with_a_backward_pass() -> None:
    adapters = LAYERS * 64 * (8 * WIDTH + 3 * (WIDTH + INNER))
    tokens, pairs = 6 * 1024, 6 * 1024 * 1025 / 2
    lora = _plan("tuning=lora", "cluster=h200", "global_batch_size=6", "tuning.embeddings=all")
    assert lora.work.recomputed == pytest.approx(2 * (BODY + adapters) * tokens + LAYERS * 4 * WIDTH * pairs)
    assert lora.work.repeated == 0
    overrides = ["tuning=freeze", "tuning.embeddings=frozen", "cluster=h200", "global_batch_size=6"]
    assert _plan(*overrides, "tuning.head=all").work.recomputed == 0
    last_block = _plan(*overrides, "tuning.head=frozen", rf"tuning.trainable=['layers\.{LAYERS - 1}\.']")
    assert last_block.work.recomputed == pytest.approx(2 * BODY / LAYERS * tokens + 4 * WIDTH * pairs)


def test_dora_with_dropout_recomputes_the_base_output() -> None:
    overrides = [
        "tuning=qlora",
        "tuning.use_dora=true",
        "cluster=h200",
        "zero=2",
        "global_batch_size=6",
        "hardware.gradient_checkpointing=false",
    ]
    plain, with_dropout = (_plan(*overrides, f"tuning.dropout={dropout}") for dropout in (0, 0.05))
    tokens = 6 * 1024
    assert (plain.work.repeated, with_dropout.work.repeated) == (0, 4 * BODY * tokens)
    assert with_dropout.work.flops == plain.work.flops
    assert with_dropout.work.recomputed - plain.work.recomputed == pytest.approx(2 * BODY * tokens)
    seconds = with_dropout.own.compute_seconds - plain.own.compute_seconds
    assert seconds == pytest.approx(4 * BODY * tokens / (0.4 * with_dropout.peak))
    # Without checkpointing all blocks keep their weights, with it the one that is computed again.
    additional_bytes = {
        checkpointing: _peak_activations(with_dropout, checkpointing)
        - _peak_activations(plain, checkpointing)
        - _dropout_bytes(checkpointing, with_dropout.config)
        for checkpointing in (False, True)
    }
    assert additional_bytes[False] == pytest.approx(2 * BODY)
    assert additional_bytes[True] == pytest.approx(2 * BODY / LAYERS)


def _peak_activations(training_plan: TrainingPlan, checkpointing: bool) -> float:
    return next(
        choice.memory.highest["activations"]
        for choice in training_plan.choices
        if choice.placement == replace(training_plan.own.placement, checkpointing=checkpointing)
    )


def _dropout_bytes(checkpointing: bool, config: PlanConfig) -> float:
    """Of every linear layer a mask and the input that is left; without dropout, inputs that are shared."""
    tokens = config.micro_batch_size * config.seq_len
    inputs, shared = 6 * WIDTH + INNER, 2 * WIDTH + INNER
    return tokens * (inputs * (1 + 2) - 2 * shared) * (1 if checkpointing else LAYERS)


def test_unbounded_disk_usage_is_reported() -> None:
    overrides = [
        *FULL,
        "cluster=h200",
        "zero=1",
        "optim.steps=null",
        "optim.epochs=2",
        "checkpoint.every=100",
        "checkpoint.keep=2",
    ]
    growing = _plan(*overrides, "checkpoint.keep_every=250")
    bytes_per_checkpoint = 12 * growing.shape.trained
    line = (
        f"checkpoint: {bytes_per_checkpoint / GIB:.2f} GiB on disk, "
        f"{3 * bytes_per_checkpoint / GIB:.2f} GiB per run plus one checkpoint every 500 steps"
    )
    assert f"{line} (checkpoint.keep_every)" in plan_report.format_plan(growing, [])
    assert plan_report.as_json(growing, [])["disk_of_run"] is None
    limited = replace(growing, config=_config(*overrides, "checkpoint.keep_every=250", "checkpoint.max_gib=500"))
    assert plan_report.as_json(limited, [])["disk_of_run"] == 500 * GIB + bytes_per_checkpoint
    disk_text = f"{500 + bytes_per_checkpoint / GIB:.2f} GiB at most (checkpoint.keep=2, checkpoint.max_gib=500)"
    assert disk_text in plan_report.format_plan(limited, [])
    assert plan.disk_bytes(5.0, _config(*overrides, "checkpoint.keep_every=250"), 1000) == (3 + 2) * 5


def test_the_json_report_has_the_notes_of_the_text_report(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("launch_plan", app.CONF.parent / "launch" / "plan.py")
    verb = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(verb)
    overrides = [*FULL, "cluster=h200", "zero=1", "global_batch_size=6", "zero.extra={zero_optimization:{stage:1}}"]
    verb.plan(_config(*overrides, "format=json"))
    report = json.loads(capsys.readouterr().out)
    assert (report["cluster"]["gpu"], report["cluster"]["gpus_per_node"]) == ("H200", 1)
    notes = report["notes"]
    left_out = "note: zero.extra: zero_optimization.stage is left out: it is zero.stage=1"
    assert left_out in notes
    assert any(note.startswith("note: no data= given") for note in notes)
    verb.plan(_config(*overrides))
    assert capsys.readouterr().out.endswith("\n".join(notes) + "\n")
