"""The same data, the same losses: at every ZeRO stage, offloaded or not, for every way of training, on one rank or
more, with and without accumulation; and from a checkpoint on as if the run had never stopped, wherever it goes on.

One table of cells, all of a number of ranks in one process group. A pairwise cover of stage, way, accumulation and
ranks is fast; the whole table with offloading is `slow`. All in float32; sums over other ranks, micro-batches and
fragments round differently, which is what the tolerances allow.
"""

from itertools import product
from pathlib import Path

import pytest
from grid import case, near, run_cases

from fireflyds.testing.models import save_tiny_llama

STAGES, ACCUMULATIONS, ROWS = (0, 1, 2, 3), (1, 3), 6
WAYS = {"full": [], "qlora": [], "lora": ["tuning.embeddings=new_rows", "tuning.head=new_rows"]}
OTHER_STAGES = ((2, 3), (3, 2), (0, 3), (1, 0))
TOLERANCE = 3e-6
# DeepSpeed's CPU Adam computes in another order than PyTorch's.
OFFLOADED = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("resume")
    save_tiny_llama(made / "base", base_vocab_size=40)
    return made


def _case(folder: Path, way: str, stage: int, ranks: int, accumulation: int | None = None, *more: str, **rest) -> dict:
    """Without an accumulation given: every stage and every way meets each."""
    chosen = accumulation or ACCUMULATIONS[(stage + list(WAYS).index(way)) % 2]
    micro = f"micro_batch_size={ROWS // ranks // chosen}"
    return case(folder / "base", way, stage, *WAYS[way], micro, *more, rows=ROWS, **rest)


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict:
    """On two ranks: four steps, two steps, and two more from there in the same and in another way."""
    cases = {}
    for way, stage in product(WAYS, STAGES):
        name = f"{way} {stage}"
        cases[name] = _case(folder, way, stage, 2)
        cases[f"{name} half"] = _case(folder, way, stage, 2, steps=2, run_dir=str(folder / name))
        cases[f"{name} rest"] = _case(folder, way, stage, 2, steps=2, resume=str(folder / name))
    for (was, now), way in product(OTHER_STAGES, WAYS):
        cases[f"{way} {was} to {now}"] = _case(folder, way, now, 2, steps=2, resume=str(folder / f"{way} {was}"))
    return run_cases(folder, cases)


@pytest.mark.parametrize("way", WAYS)
def test_losses_are_equal_at_every_stage_and_accumulation(whole: dict, way: str) -> None:
    assert whole[f"{way} 0"]["losses"][-1] < whole[f"{way} 0"]["losses"][0]
    for stage in STAGES:
        near(whole[f"{way} {stage}"]["losses"], whole[f"{way} 0"]["losses"], TOLERANCE)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stage", STAGES)
def test_half_and_rest_are_the_whole_bit_for_bit(whole: dict, way: str, stage: int) -> None:
    name = f"{way} {stage}"
    assert whole[f"{name} half"]["losses"] + whole[f"{name} rest"]["losses"] == whole[name]["losses"]
    assert whole[f"{name} rest"]["norms"] == whole[name]["norms"][2:]
    assert whole[f"{name} rest"]["parameters"] == whole[name]["parameters"][2:]


@pytest.mark.parametrize(("was", "now"), OTHER_STAGES)
def test_another_zero_stage_goes_on_with_the_same_losses(whole: dict, was: int, now: int) -> None:
    for way in WAYS:
        near(whole[f"{way} {was} to {now}"]["losses"], whole[f"{way} {was}"]["losses"][2:], TOLERANCE)


@pytest.fixture(scope="module")
def one(whole: dict, folder: Path) -> dict:
    """On one rank: a step more from the checkpoints of two."""
    cases = {
        f"{way} {stage}": _case(
            folder,
            way,
            stage,
            1,
            steps=1,
            resume=str(folder / f"{way} {stage}"),
            run_dir=str(folder / f"{way} {stage} one"),
        )
        for way, stage in product(WAYS, STAGES)
    }
    return run_cases(folder, cases, ranks=1)


def test_fewer_ranks_go_on_with_the_same_losses(whole: dict, one: dict) -> None:
    for name, found in one.items():
        near(found["losses"], whole[name]["losses"][2:3], TOLERANCE)


@pytest.mark.slow
def test_two_ranks_to_one_to_two_go_on_with_the_same_losses(whole: dict, one: dict, folder: Path) -> None:
    assert one
    eight = ["optim=adamw_8bit", "optim.lr=1e-2", "optim.betas=[0.9,0.95]"]
    cases = {
        f"{way} {stage}": _case(folder, way, stage, 2, steps=1, resume=str(folder / f"{way} {stage} one"))
        for way, stage in product(WAYS, STAGES)
    }
    cases["8 bit"] = _case(folder, "full", 2, 2, 1, *eight)
    cases["8 bit half"] = _case(folder, "full", 2, 2, 1, *eight, steps=2, run_dir=str(folder / "8 bit"))
    cases["8 bit rest"] = _case(folder, "full", 2, 2, 1, *eight, steps=2, resume=str(folder / "8 bit"))
    cases["8 bit to 3"] = _case(folder, "full", 3, 2, 1, *eight, steps=2, resume=str(folder / "8 bit"))
    two = run_cases(folder, cases)
    for way, stage in product(WAYS, STAGES):
        near(two[f"{way} {stage}"]["losses"], whole[f"{way} {stage}"]["losses"][3:], TOLERANCE)
    assert two["8 bit half"]["losses"] + two["8 bit rest"]["losses"] == two["8 bit"]["losses"]
    assert (
        "the states of this optimizer cannot be repartitioned; they were saved by 2 ranks at zero.stage=2"
        in two["8 bit to 3"]["error"]
    )


@pytest.mark.slow
def test_more_ranks_go_on_with_the_same_losses(whole: dict, folder: Path) -> None:
    """Two to four, where only some accumulations divide."""
    cases = {
        f"{way} {stage}": case(
            folder / "base", way, stage, *WAYS[way], steps=2, rows=4, resume=str(folder / f"{way} {stage} of 4")
        )
        for way, stage in product(WAYS, STAGES)
    }
    before = {name: {**each, "resume": None, "run_dir": each["resume"]} for name, each in cases.items()}
    after = {f"{name} on": {**each, "resume": each["resume"]} for name, each in cases.items()}
    two = run_cases(folder, before | after)
    four = run_cases(folder, cases, ranks=4)
    for name in cases:
        near(four[name]["losses"], two[f"{name} on"]["losses"], TOLERANCE)


@pytest.mark.slow
def test_the_whole_table_has_the_same_losses(folder: Path) -> None:
    """Stage x offloading x way x accumulation x ranks, against one rank at stage 0 without accumulation."""
    offloads = {
        "none": ([], STAGES),
        "optimizer": (["zero.offload_optimizer=cpu"], (1, 2, 3)),
        "both": (["zero.offload_optimizer=cpu", "zero.offload_param=cpu"], (3,)),
    }
    found = {}
    for ranks in (1, 2):
        cases = {
            f"{way}, stage {stage}, offloaded {kind}, {accumulation} accumulated": _case(
                folder, way, stage, ranks, accumulation, *more, steps=3
            )
            for kind, (more, stages) in offloads.items()
            for way, stage, accumulation in product(WAYS, stages, ACCUMULATIONS)
        }
        found |= {f"{name}, {ranks} ranks": each for name, each in run_cases(folder, cases, ranks=ranks).items()}
    assert len(found) == 2 * 2 * 3 * 8
    for name, each in found.items():
        wanted = found[f"{name.split(',')[0]}, stage 0, offloaded none, 1 accumulated, 1 ranks"]["losses"]
        near(each["losses"], wanted, TOLERANCE if "offloaded none" in name else OFFLOADED)


@pytest.mark.slow
def test_number_formats_optimizers_and_loss_scales_go_on_bit_for_bit(folder: Path) -> None:
    fp16 = [
        "hardware.precision=fp16",
        "hardware.initial_scale_power=8",
        "hardware.hysteresis=1",
        "hardware.loss_scale_window=2",
        "hardware.min_loss_scale=64",
    ]
    ways = {
        "bf16": (["hardware.precision=bf16"], STAGES),
        "fp16": (fp16, (1, 2, 3)),
        "muon": (["optim=muon", "optim.lr=1e-2"], STAGES),
        "paged": (["optim=paged_adamw_32bit", "optim.lr=1e-2"], (0, 2, 3)),
    }
    cases = {}
    for name, (more, stages) in ways.items():
        for stage in stages:
            kept, overflow = str(folder / f"{name} {stage}"), {"overflow": [2]} if name == "fp16" else {}
            cases[f"{name} {stage}"] = _case(folder, "full", stage, 2, 1, *more, steps=6, **overflow)
            cases[f"{name} {stage} half"] = _case(folder, "full", stage, 2, 1, *more, steps=3, run_dir=kept, **overflow)
            cases[f"{name} {stage} rest"] = _case(folder, "full", stage, 2, 1, *more, steps=3, resume=kept)
    found = run_cases(folder, cases)
    for name, (_, stages) in ways.items():
        for stage in stages:
            for kind in ("losses", "scales"):
                halves = found[f"{name} {stage} half"][kind] + found[f"{name} {stage} rest"][kind]
                assert halves == found[f"{name} {stage}"][kind], (name, stage, kind)
