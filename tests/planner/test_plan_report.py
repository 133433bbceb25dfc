"""What a plan offers and prefers, how long and how large it says a run is, and what it refuses."""

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


def test_every_stage_offloading_and_dividing_micro_batch_is_offered_once() -> None:
    found = _plan(*FULL, "cluster=a100x8", "global_batch_size=48", "micro_batch_size=1").choices
    offered = [(c.placement.stage, c.offload, c.placement.micro_batch_size, c.placement.checkpointing) for c in found]
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
    wanted = [(*layout, micro, again) for layout in layouts for micro in (1, 2, 3, 6) for again in (False, True)]
    assert sorted(offered) == sorted(wanted)
    assert all(c.placement.accumulation * c.placement.micro_batch_size == 6 for c in found)


def test_what_training_refuses_is_not_offered() -> None:
    # float16 has no stage 0, and bitsandbytes' states are not offloaded.
    found = _plan("cluster=v100x4").choices
    assert {(c.placement.stage, c.offload) for c in found} == {(1, "none"), (2, "none"), (3, "none")}


def test_the_fastest_that_fits_stands_first_and_what_does_not_fit_last() -> None:
    made = _plan(*FULL, "cluster=a100x8", "global_batch_size=128", "micro_batch_size=1")
    fitting = [choice for choice in made.choices if choice.fits]
    assert made.fastest is made.choices[0]
    assert [c.seconds for c in fitting] == sorted(c.seconds for c in fitting)
    assert [c.fits for c in made.choices] == sorted((c.fits for c in made.choices), reverse=True)
    # 16 bytes x 6.9 billion do not fit 80 GB; sharded states do.
    assert {c.placement.stage for c in fitting} == {1, 2, 3}
    stage0 = next(c for c in made.choices if c.placement.stage == 0)
    assert stage0.why_not.endswith("GiB needed, 74.4 GiB available per GPU")
    assert not made.fastest.placement.checkpointing


def test_of_equals_the_plan_takes_less_sharding() -> None:
    made = _plan(*FULL, "cluster=h200", "model=llama2_7b_ext", "model.architecture.num_hidden_layers=4")
    best = made.fastest
    assert (best.placement.stage, best.offload, best.placement.checkpointing) == (0, "none", False)


def test_where_nothing_fits_the_plan_says_so_and_still_tells_its_own_choice() -> None:
    made = _plan(*FULL, "cluster=h200", "cluster.gpu_memory_gib=12", "cluster.host_memory_gib=64")
    assert made.fastest is None
    assert made.best is made.own
    shown = plan_report.format_plan(made, [])
    assert (
        "fastest: nothing fits. Give more or larger GPUs (cluster.*), or try tuning=qlora, a shorter seq_len" in shown
    )
    assert "as configured (zero=1, offload none, micro_batch_size=6, without checkpointing): does not fit: " in shown
    assert plan_report.as_json(made, [])["fastest"] is None


def test_time_is_flops_over_what_the_gpus_reach() -> None:
    made = _plan(*FULL, "cluster=h200", "global_batch_size=6")
    tokens, pairs = 6 * 1024, 6 * 1024 * 1025 / 2
    assert made.work.flops == 6 * (BODY + EMBEDDINGS) * tokens + 32 * 12 * 4096 * pairs
    assert made.work.recomputed == pytest.approx(2 * BODY * tokens + 32 * 4 * 4096 * pairs)
    assert made.peak == 989e12
    launches = 32 * search.LAUNCH_SECONDS
    assert made.own.seconds == pytest.approx(made.work.flops / (0.4 * 989e12) + launches)
    again = next(
        c
        for c in made.choices
        if (c.placement.checkpointing, c.placement.stage, c.placement.accumulation, c.offload) == (True, 1, 1, "none")
    )
    flops = made.work.flops + made.work.recomputed
    assert again.seconds == pytest.approx(flops / (0.4 * 989e12) + launches * 4 / 3)
    told = plan_report.as_json(made, [])
    assert told["hours"] == pytest.approx(made.best.seconds * 10 / 3600)
    assert told["tokens"] == 10 * tokens
    assert told["flops"] == 10 * made.work.flops


def test_communication_is_that_of_ring_algorithms() -> None:
    made = _plan(*FULL, "cluster=a100x8", "global_batch_size=32", "micro_batch_size=2")
    whole = 2 * made.shape.trained
    found = {
        (c.placement.stage): search.communication_bytes(made.shape, Precision.bf16, c.placement)
        for c in made.choices
        if c.offload == "none" and c.placement.micro_batch_size == 2
    }
    # Two micro-batches of two rows a GPU; seven eighths of everything leave it.
    assert found == {0: whole * 2 * 7 / 8, 1: whole * 2 * 7 / 8, 2: whole * 3 * 7 / 8, 3: whole * 2 * 3 * 7 / 8}


def test_a_checkpoint_holds_masters_and_states_of_what_trains() -> None:
    made = _plan(*FULL)
    trained = made.shape.trained
    assert plan.checkpoint_bytes(made.shape) == 12 * trained
    adapters = _plan()
    assert adapters.shape.trained == 612_892_672
    assert plan.checkpoint_bytes(adapters.shape) == 12 * 612_892_672
    config = _config("checkpoint.every=100", "checkpoint.keep=2")
    assert plan.disk_bytes(5.0, config, 150) == 10.0
    assert plan.disk_bytes(5.0, config, 1000) == 15.0
    assert plan.disk_bytes(5.0, config, None) == 15.0


def test_without_data_the_plan_says_what_it_takes_for_granted() -> None:
    found = plan.summarize_data(_config("optim.steps=null", "optim.epochs=2"), None)
    assert (found.steps, found.lengths, found.labelled_share) == (None, [1024], 1)
    assert found.note.startswith("note: no data= given: a row is assumed to be one document of seq_len=1024")
    assert found.note.endswith("the steps of optim.epochs=2 are not known without data")
    assert plan.summarize_data(_config("data=stores/none"), None).note.startswith(
        "note: data.store=stores/none does not exist"
    )


def test_what_the_gpus_cannot_do_is_refused() -> None:
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
def test_steps_tokens_and_disk_are_those_of_the_run(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    (tmp_path / "en.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    verb("prepare", "data=en.txt", f"tokenizer={base_tokenizer}", "out=en", "workers=1")
    architecture = (
        "{model_type: llama, hidden_size: 256, intermediate_size: 512, num_hidden_layers: 2, num_attention_heads: 4, "
        "num_key_value_heads: 4, max_position_embeddings: 256, tie_word_embeddings: false}"
    )
    same = [
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
        verb("train", f"run={name}", *same, *options, "hardware=fp32")
        one = ["cluster=cpu", "cluster.gpus_per_node=1", "hardware=fp32", "format=json"]
        told = json.loads(verb("plan", *same, *options, *one).stdout)
        last = json.loads((tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()[-1])
        assert told["steps"] == last["step"]
        assert told["tokens"] == pytest.approx(last["tokens"], rel=0.05)
        assert told["own"]["fits"]
        checkpoint = next((tmp_path / "runs" / name / "checkpoints").glob("step-*"))
        written = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
        assert told["disk_per_checkpoint"] == pytest.approx(written, rel=0.15), name
