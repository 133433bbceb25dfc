"""The same data give the same losses at every ZeRO stage, with and without offloading, for every tuning method, on one
rank or more, with and without accumulation; a resumed run has the losses of an uninterrupted one, also resharded.

All cases of one number of ranks run in one process group. A pairwise cover of stage, method, accumulation and ranks is
fast; the full product with offloading is `slow`. All in float32; sums over ranks, micro-batches and partitions round
differently, hence the tolerances.
"""

from itertools import product
from pathlib import Path

import pytest
from grid import case, near, run_cases

from fireflyds.testing.models import save_tiny_llama

STAGES, ACCUMULATIONS, ROWS = (0, 1, 2, 3), (1, 3), 6
METHODS = {"full": [], "qlora": [], "lora": ["tuning.embeddings=new_rows", "tuning.head=new_rows"]}
OTHER_STAGES = ((2, 3), (3, 2), (0, 3), (1, 0))
TOLERANCE = 3e-6
# DeepSpeed's CPU Adam computes in another order than PyTorch's.
OFFLOAD_TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("resume")
    save_tiny_llama(path / "base", base_vocab_size=40)
    return path


def _case(
    folder: Path, method: str, stage: int, ranks: int, accumulation: int | None = None, *overrides: str, **options
) -> dict:
    """Without `accumulation`, every stage and every method is run with each value."""
    num_accumulated = accumulation or ACCUMULATIONS[(stage + list(METHODS).index(method)) % 2]
    micro = f"micro_batch_size={ROWS // ranks // num_accumulated}"
    return case(folder / "base", method, stage, *METHODS[method], micro, *overrides, rows=ROWS, **options)


@pytest.fixture(scope="module")
def two_rank_results(folder: Path) -> dict:
    """On two ranks: four steps; two steps; and two resumed steps at the same and at another ZeRO stage."""
    cases = {}
    for method, stage in product(METHODS, STAGES):
        name = f"{method} {stage}"
        cases[name] = _case(folder, method, stage, 2)
        cases[f"{name} half"] = _case(folder, method, stage, 2, steps=2, run_dir=str(folder / name))
        cases[f"{name} rest"] = _case(folder, method, stage, 2, steps=2, resume=str(folder / name))
    for (saved_stage, resumed_stage), method in product(OTHER_STAGES, METHODS):
        cases[f"{method} {saved_stage} to {resumed_stage}"] = _case(
            folder, method, resumed_stage, 2, steps=2, resume=str(folder / f"{method} {saved_stage}")
        )
    return run_cases(folder, cases)


@pytest.mark.parametrize("method", METHODS)
def test_losses_are_equal_at_every_stage_and_accumulation(two_rank_results: dict, method: str) -> None:
    assert two_rank_results[f"{method} 0"]["losses"][-1] < two_rank_results[f"{method} 0"]["losses"][0]
    for stage in STAGES:
        near(two_rank_results[f"{method} {stage}"]["losses"], two_rank_results[f"{method} 0"]["losses"], TOLERANCE)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("stage", STAGES)
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(two_rank_results: dict, method: str, stage: int) -> None:
    name = f"{method} {stage}"
    assert (
        two_rank_results[f"{name} half"]["losses"] + two_rank_results[f"{name} rest"]["losses"]
        == two_rank_results[name]["losses"]
    )
    assert two_rank_results[f"{name} rest"]["norms"] == two_rank_results[name]["norms"][2:]
    assert two_rank_results[f"{name} rest"]["parameters"] == two_rank_results[name]["parameters"][2:]


@pytest.mark.parametrize(("saved_stage", "resumed_stage"), OTHER_STAGES)
def test_resuming_at_another_zero_stage_gives_the_same_losses(
    two_rank_results: dict, saved_stage: int, resumed_stage: int
) -> None:
    for method in METHODS:
        near(
            two_rank_results[f"{method} {saved_stage} to {resumed_stage}"]["losses"],
            two_rank_results[f"{method} {saved_stage}"]["losses"][2:],
            TOLERANCE,
        )


@pytest.fixture(scope="module")
def one_rank_results(two_rank_results: dict, folder: Path) -> dict:
    """On one rank: one more step from the checkpoints of two ranks."""
    cases = {
        f"{method} {stage}": _case(
            folder,
            method,
            stage,
            1,
            steps=1,
            resume=str(folder / f"{method} {stage}"),
            run_dir=str(folder / f"{method} {stage} one"),
        )
        for method, stage in product(METHODS, STAGES)
    }
    return run_cases(folder, cases, ranks=1)


@pytest.mark.slow
def test_resuming_on_fewer_ranks_gives_the_same_losses(two_rank_results: dict, one_rank_results: dict) -> None:
    for name, result in one_rank_results.items():
        near(result["losses"], two_rank_results[name]["losses"][2:3], TOLERANCE)


@pytest.mark.slow
def test_resuming_from_two_ranks_on_one_and_on_two_again_gives_the_same_losses(
    two_rank_results: dict, one_rank_results: dict, folder: Path
) -> None:
    assert one_rank_results
    options = ["optim=adamw_8bit", "optim.lr=1e-2", "optim.betas=[0.9,0.95]"]
    cases = {
        f"{method} {stage}": _case(folder, method, stage, 2, steps=1, resume=str(folder / f"{method} {stage} one"))
        for method, stage in product(METHODS, STAGES)
    }
    cases["8 bit"] = _case(folder, "full", 2, 2, 1, *options)
    cases["8 bit half"] = _case(folder, "full", 2, 2, 1, *options, steps=2, run_dir=str(folder / "8 bit"))
    cases["8 bit rest"] = _case(folder, "full", 2, 2, 1, *options, steps=2, resume=str(folder / "8 bit"))
    cases["8 bit to 3"] = _case(folder, "full", 3, 2, 1, *options, steps=2, resume=str(folder / "8 bit"))
    results = run_cases(folder, cases)
    for method, stage in product(METHODS, STAGES):
        near(results[f"{method} {stage}"]["losses"], two_rank_results[f"{method} {stage}"]["losses"][3:], TOLERANCE)
    assert results["8 bit half"]["losses"] + results["8 bit rest"]["losses"] == results["8 bit"]["losses"]
    assert (
        "the states of this optimizer cannot be repartitioned; they were saved by 2 ranks at zero.stage=2"
        in results["8 bit to 3"]["error"]
    )


@pytest.mark.slow
def test_resuming_on_more_ranks_gives_the_same_losses(two_rank_results: dict, folder: Path) -> None:
    """Two ranks to four, where only some accumulations divide."""
    cases = {
        f"{method} {stage}": case(
            folder / "base",
            method,
            stage,
            *METHODS[method],
            steps=2,
            rows=4,
            resume=str(folder / f"{method} {stage} of 4"),
        )
        for method, stage in product(METHODS, STAGES)
    }
    saving_cases = {
        name: {**case_of_name, "resume": None, "run_dir": case_of_name["resume"]}
        for name, case_of_name in cases.items()
    }
    resuming_cases = {
        f"{name} on": {**case_of_name, "resume": case_of_name["resume"]} for name, case_of_name in cases.items()
    }
    two_rank_results_of_4 = run_cases(folder, saving_cases | resuming_cases)
    four_rank_results = run_cases(folder, cases, ranks=4)
    for name in cases:
        near(four_rank_results[name]["losses"], two_rank_results_of_4[f"{name} on"]["losses"], TOLERANCE)


@pytest.mark.slow
def test_every_combination_of_settings_gives_the_same_losses(folder: Path) -> None:
    """Stage x offloading x method x accumulation x ranks, against one rank at stage 0 without accumulation."""
    offloads = {
        "none": ([], STAGES),
        "optimizer": (["zero.offload_optimizer=cpu"], (1, 2, 3)),
        "both": (["zero.offload_optimizer=cpu", "zero.offload_param=cpu"], (3,)),
    }
    results = {}
    for ranks in (1, 2):
        cases = {
            f"{method}, stage {stage}, offloaded {kind}, {accumulation} accumulated": _case(
                folder, method, stage, ranks, accumulation, *overrides, steps=3
            )
            for kind, (overrides, stages) in offloads.items()
            for method, stage, accumulation in product(METHODS, stages, ACCUMULATIONS)
        }
        results |= {f"{name}, {ranks} ranks": result for name, result in run_cases(folder, cases, ranks=ranks).items()}
    assert len(results) == 2 * 2 * 3 * 8
    for name, result in results.items():
        expected = results[f"{name.split(',')[0]}, stage 0, offloaded none, 1 accumulated, 1 ranks"]["losses"]
        near(result["losses"], expected, TOLERANCE if "offloaded none" in name else OFFLOAD_TOLERANCE)


@pytest.mark.slow
def test_number_formats_optimizers_and_loss_scales_resume_bit_for_bit(folder: Path) -> None:
    fp16 = [
        "hardware.precision=fp16",
        "hardware.initial_scale_power=8",
        "hardware.hysteresis=1",
        "hardware.loss_scale_window=2",
        "hardware.min_loss_scale=64",
    ]
    formats = {
        "bf16": (["hardware.precision=bf16"], STAGES),
        "fp16": (fp16, (1, 2, 3)),
        "muon": (["optim=muon", "optim.lr=1e-2"], STAGES),
        "paged": (["optim=paged_adamw_32bit", "optim.lr=1e-2"], (0, 2, 3)),
    }
    cases = {}
    for name, (overrides, stages) in formats.items():
        for stage in stages:
            run_dir, overflow = str(folder / f"{name} {stage}"), {"overflow": [2]} if name == "fp16" else {}
            cases[f"{name} {stage}"] = _case(folder, "full", stage, 2, 1, *overrides, steps=6, **overflow)
            cases[f"{name} {stage} half"] = _case(
                folder, "full", stage, 2, 1, *overrides, steps=3, run_dir=run_dir, **overflow
            )
            cases[f"{name} {stage} rest"] = _case(folder, "full", stage, 2, 1, *overrides, steps=3, resume=run_dir)
    results = run_cases(folder, cases)
    for name, (_, stages) in formats.items():
        for stage in stages:
            for kind in ("losses", "scales"):
                halves = results[f"{name} {stage} half"][kind] + results[f"{name} {stage} rest"][kind]
                assert halves == results[f"{name} {stage}"][kind], (name, stage, kind)
