"""What alternatives cost beside the GPU: host, traffic, recomputation; and that they are offered where they should
be."""

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
    given = [
        "experiment=firefly_llama2_7b_ext_cpt_qlora",
        "optim.steps=10",
        f"model.architecture.num_hidden_layers={LAYERS}",
    ]
    return app.compose("plan", [*given, *overrides])


def _plan(*overrides: str) -> TrainingPlan:
    return plan_of(_config(*overrides))


def _layouts(made: TrainingPlan) -> set[tuple[int, str]]:
    return {(choice.placement.stage, choice.offload) for choice in made.choices}


def test_the_host_holds_a_copy_of_masters_and_states_while_a_checkpoint_is_written() -> None:
    given = [*FULL, "cluster=h200", "zero=1", "zero.offload_optimizer=cpu", "global_batch_size=6"]
    made = _plan(*given)
    trained = made.shape.trained
    # Masters, two states, float32 gradients and a copy of the weights in the model's format; of the first three a copy.
    assert made.own.memory.host == (12 + 4 + 2) * trained
    assert made.own.host_per_node == (18 + 12) * trained + 3 * GIB
    between = (18 + 6) * trained / GIB + 3
    refused = _plan(*given, f"cluster.host_memory_gib={between:.1f}")
    assert refused.own.why_not == f"{made.own.host_per_node / GIB:.0f} GiB needed, {between:.1f} GiB available per host"
    # Every rank saves its share.
    shared = _plan(*FULL, "cluster=a100x8", "zero=1", "global_batch_size=48")
    assert shared.own.memory.host_saving == 12 * trained / 8


def test_on_the_cpu_the_host_holds_ranks_their_copies_and_libraries() -> None:
    made = _plan(*ON_CPU, "zero=1")
    memory, trained = made.own.memory, made.shape.trained
    each = memory.total + 12 * trained / 2 + search.CPU_LIBRARIES_GIB * GIB
    assert made.own.host_per_node == pytest.approx(2 * each)
    # Where training waits for it, activations and gradients are gone by then.
    waits = _plan(*ON_CPU, "zero=1", "checkpoint.background=false")
    resting = 4 * trained + 12 * trained / 2 + memory.items["fixed"]
    worst = max(memory.total, resting + 12 * trained / 2)
    assert waits.own.host_per_node == pytest.approx(2 * (worst + search.CPU_LIBRARIES_GIB * GIB))
    assert waits.own.host_per_node < made.own.host_per_node


def test_the_cpu_is_the_cpu_however_it_is_written() -> None:
    lower, upper = _plan(*ON_CPU, "zero=1"), _plan(*ON_CPU, "zero=1", "cluster.gpu=CPU")
    assert upper.own == lower.own
    assert upper.choices == lower.choices
    assert (
        plan.cluster_precision(_config("cluster=cpu", "cluster.gpu=CPU", "hardware.precision=auto")) is Precision.fp32
    )


def test_a_plan_for_cpus_speaks_of_ranks() -> None:
    small = plan_report.format_plan(_plan(*ON_CPU, "zero=1", "cluster.gpu_memory_gib=1"), [])
    assert "GPU" not in small
    assert "peak GiB per rank within a step" in small
    assert "GiB needed, 1.0 GiB available per rank" in small
    assert "nothing fits. Give more machines or memory (cluster.*)" in small


def test_a_layout_in_deepspeed_s_own_configuration_leaves_the_alternatives() -> None:
    given = [*FULL, "cluster=a100x8", "zero=1", "global_batch_size=48"]
    named = _plan(*given, "zero.extra={zero_optimization:{stage:1,offload_optimizer:{device:none}}}")
    assert _layouts(named) == _layouts(_plan(*given))
    assert len(_layouts(named)) == 8
    assert named.own.fits
    assert named.fastest is not None


def test_offloaded_gradients_add_up_where_deepspeed_adds_them_up() -> None:
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
    # The sum goes down four times and comes up three times.
    assert bytes_each(2, 4) == pytest.approx(7 * 2 + 4 + 2)
    # At stage 3 it comes up each time.
    assert bytes_each(3, 1) == pytest.approx(2 * 2 + 4 + 2)
    assert bytes_each(3, 4) == pytest.approx(8 * 2 + 4 + 2)
    # Weights that live on the host come up twice a micro-batch instead; nothing is frozen here.
    assert bytes_each(3, 4, parameters=True) == pytest.approx(8 * 2 + 4 + 2 * 4 * 2)


def test_recomputation_is_the_forward_pass_of_blocks_that_go_backward() -> None:
    adapters = LAYERS * 64 * (8 * WIDTH + 3 * (WIDTH + INNER))
    tokens, pairs = 6 * 1024, 6 * 1024 * 1025 / 2
    lora = _plan("tuning=lora", "cluster=h200", "global_batch_size=6", "tuning.embeddings=all")
    assert lora.work.recomputed == pytest.approx(2 * (BODY + adapters) * tokens + LAYERS * 4 * WIDTH * pairs)
    assert lora.work.repeated == 0
    alone = ["tuning=freeze", "tuning.embeddings=frozen", "cluster=h200", "global_batch_size=6"]
    assert _plan(*alone, "tuning.head=all").work.recomputed == 0
    last = _plan(*alone, "tuning.head=frozen", rf"tuning.trainable=['layers\.{LAYERS - 1}\.']")
    assert last.work.recomputed == pytest.approx(2 * BODY / LAYERS * tokens + 4 * WIDTH * pairs)


def test_dora_computes_the_base_again_behind_its_dropout() -> None:
    given = [
        "tuning=qlora",
        "tuning.use_dora=true",
        "cluster=h200",
        "zero=2",
        "global_batch_size=6",
        "hardware.gradient_checkpointing=false",
    ]
    plain, dropped = (_plan(*given, f"tuning.dropout={each}") for each in (0, 0.05))
    tokens = 6 * 1024
    assert (plain.work.repeated, dropped.work.repeated) == (0, 4 * BODY * tokens)
    assert dropped.work.flops == plain.work.flops
    assert dropped.work.recomputed - plain.work.recomputed == pytest.approx(2 * BODY * tokens)
    seconds = dropped.own.compute_seconds - plain.own.compute_seconds
    assert seconds == pytest.approx(4 * BODY * tokens / (0.4 * dropped.peak))
    # Without checkpointing all blocks keep their weights, with it the one that is computed again.
    more = {
        again: _highest(dropped, again) - _highest(plain, again) - _dropout_bytes(again, dropped.config)
        for again in (False, True)
    }
    assert more[False] == pytest.approx(2 * BODY)
    assert more[True] == pytest.approx(2 * BODY / LAYERS)


def _highest(made: TrainingPlan, checkpointing: bool) -> float:
    return next(
        choice.memory.highest["activations"]
        for choice in made.choices
        if choice.placement == replace(made.own.placement, checkpointing=checkpointing)
    )


def _dropout_bytes(checkpointing: bool, config: PlanConfig) -> float:
    """Of every linear layer a mask and the input that is left; without dropout, inputs that are shared."""
    tokens = config.micro_batch_size * config.seq_len
    inputs, shared = 6 * WIDTH + INNER, 2 * WIDTH + INNER
    return tokens * (inputs * (1 + 2) - 2 * shared) * (1 if checkpointing else LAYERS)


def test_disk_that_grows_as_long_as_the_run_is_said_to_grow() -> None:
    given = [
        *FULL,
        "cluster=h200",
        "zero=1",
        "optim.steps=null",
        "optim.epochs=2",
        "checkpoint.every=100",
        "checkpoint.keep=2",
    ]
    grows = _plan(*given, "checkpoint.keep_every=250")
    each = 12 * grows.shape.trained
    line = (
        f"checkpoint: {each / GIB:.2f} GiB on disk, {3 * each / GIB:.2f} GiB per run plus one checkpoint every 500 "
        "steps"
    )
    assert f"{line} (checkpoint.keep_every)" in plan_report.format_plan(grows, [])
    assert plan_report.as_json(grows, [])["disk_of_run"] is None
    limited = replace(grows, config=_config(*given, "checkpoint.keep_every=250", "checkpoint.max_gib=500"))
    assert plan_report.as_json(limited, [])["disk_of_run"] == 500 * GIB + each
    shown = f"{500 + each / GIB:.2f} GiB at most (checkpoint.keep=2, checkpoint.max_gib=500)"
    assert shown in plan_report.format_plan(limited, [])
    assert plan.disk_bytes(5.0, _config(*given, "checkpoint.keep_every=250"), 1000) == (3 + 2) * 5


def test_json_has_the_notes_that_people_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    spec = importlib.util.spec_from_file_location("launch_plan", app.CONF.parent / "launch" / "plan.py")
    verb = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(verb)
    given = [*FULL, "cluster=h200", "zero=1", "global_batch_size=6", "zero.extra={zero_optimization:{stage:1}}"]
    verb.plan(_config(*given, "format=json"))
    told = json.loads(capsys.readouterr().out)
    assert (told["cluster"]["gpu"], told["cluster"]["gpus_per_node"]) == ("H200", 1)
    notes = told["notes"]
    left_out = "note: zero.extra: zero_optimization.stage is left out: it is zero.stage=1"
    assert left_out in notes
    assert any(note.startswith("note: no data= given") for note in notes)
    verb.plan(_config(*given))
    assert capsys.readouterr().out.endswith("\n".join(notes) + "\n")
