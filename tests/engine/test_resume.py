"""A run goes on from its checkpoint as if it had never stopped: on as many ranks or on others, at its ZeRO stage or another."""

from pathlib import Path

import pytest
from grid import case, near, run_cases
from llama_bases import make_base

STAGES = (0, 1, 2, 3)
TUNINGS = {"full": [], "qlora": [], "lora": ["tuning.embeddings=new_rows", "tuning.head=new_rows"]}
# Sums over other ranks and fragments round differently; in float32.
TOLERANCE = 3e-6


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("resume")
    make_base(made / "base", base_vocab_size=40)
    return made


def _case(folder: Path, tuning: str, stage: int, *more: str, **rest) -> dict:
    return case(folder / "base", tuning, stage, *TUNINGS[tuning], *more, **rest)


@pytest.fixture(scope="module")
def whole(folder: Path) -> dict:
    """On two ranks: four steps, two steps, and two more from there in the same and in another way."""
    cases = {}
    for tuning in TUNINGS:
        for stage in STAGES:
            name = f"{tuning} {stage}"
            cases[name] = _case(folder, tuning, stage)
            cases[f"{name} half"] = _case(folder, tuning, stage, steps=2, run_dir=str(folder / name))
            cases[f"{name} rest"] = _case(folder, tuning, stage, steps=2, resume=str(folder / name))
    for was, now in ((2, 3), (3, 2), (0, 3), (1, 0)):
        for tuning in TUNINGS:
            cases[f"{tuning} {was} to {now}"] = _case(
                folder, tuning, now, steps=2, resume=str(folder / f"{tuning} {was}")
            )
    return run_cases(folder, cases)


@pytest.mark.parametrize("tuning", TUNINGS)
@pytest.mark.parametrize("stage", STAGES)
def test_half_and_rest_are_the_whole_bit_for_bit(whole: dict, tuning: str, stage: int) -> None:
    name = f"{tuning} {stage}"
    assert whole[f"{name} half"]["losses"] + whole[f"{name} rest"]["losses"] == whole[name]["losses"]
    assert whole[f"{name} rest"]["norms"] == whole[name]["norms"][2:]
    assert whole[f"{name} rest"]["parameters"] == whole[name]["parameters"][2:]


@pytest.mark.parametrize(("was", "now"), [(2, 3), (3, 2), (0, 3), (1, 0)])
def test_another_zero_stage_goes_on_with_the_same_losses(whole: dict, was: int, now: int) -> None:
    for tuning in TUNINGS:
        near(whole[f"{tuning} {was} to {now}"]["losses"], whole[f"{tuning} {was}"]["losses"][2:], TOLERANCE)


def test_another_number_of_ranks_goes_on_with_the_same_losses(whole: dict, folder: Path) -> None:
    """Two ranks to one, and back to two."""
    names = [f"{tuning} {stage}" for tuning in TUNINGS for stage in STAGES]
    one = run_cases(
        folder,
        {name: _case(folder, *_split(name), steps=1, resume=str(folder / name), run_dir=str(folder / f"{name} one")) for name in names},
        ranks=1,
    )  # fmt: skip
    two = run_cases(
        folder, {name: _case(folder, *_split(name), steps=1, resume=str(folder / f"{name} one")) for name in names}
    )
    for name in names:
        near(one[name]["losses"] + two[name]["losses"], whole[name]["losses"][2:], TOLERANCE)


@pytest.mark.slow
def test_more_ranks_go_on_with_the_same_losses(whole: dict, folder: Path) -> None:
    names = [f"{tuning} {stage}" for tuning in TUNINGS for stage in STAGES]
    four = run_cases(
        folder, {name: _case(folder, *_split(name), steps=2, resume=str(folder / name)) for name in names}, ranks=4
    )
    for name in names:
        near(four[name]["losses"], whole[name]["losses"][2:], TOLERANCE)


def _split(name: str) -> tuple[str, int]:
    tuning, stage = name.split()
    return tuning, int(stage)
