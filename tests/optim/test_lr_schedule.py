import dataclasses

import pytest

from fireflyds.config import OptimConfig, Schedule
from fireflyds.optim.lr_schedule import lr_factor

BASE = OptimConfig(name="adamw", steps=100, lr=2.0, warmup_steps=10, min_lr_ratio=0.1)


def _rates(**changes) -> list[float]:
    config = dataclasses.replace(BASE, **changes)
    return [lr_factor(step, 100, config) for step in range(100)]


@pytest.mark.parametrize("schedule", [Schedule.cosine, Schedule.linear])
def test_decay_warms_up_to_the_peak_and_ends_at_the_minimum(schedule: Schedule) -> None:
    rates = _rates(schedule=schedule)
    assert rates[0] == pytest.approx(1 / 11)
    assert rates[10] == max(rates) == pytest.approx(1.0)
    assert rates[-1] == pytest.approx(0.1)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert len(set(rates[10:])) == 90
    assert 0 < rates[0] < rates[5] < rates[9]


def test_halfway_values() -> None:
    no_warmup = {"warmup_steps": 0}
    config = dataclasses.replace(BASE, schedule=Schedule.cosine, **no_warmup)
    assert lr_factor(50, 101, config) == pytest.approx(0.55)
    assert lr_factor(25, 101, dataclasses.replace(config, schedule=Schedule.linear)) == pytest.approx(1 - 0.9 / 4)


def test_constant_has_no_warmup_and_constant_with_warmup_has() -> None:
    assert set(_rates(schedule=Schedule.constant, warmup_steps=None, warmup_ratio=0.1)) == {1.0}
    rates = _rates(schedule=Schedule.constant_with_warmup, warmup_steps=None, warmup_ratio=0.1)
    assert rates[9] < 1.0
    assert set(rates[10:]) == {1.0}


def test_one_step_runs() -> None:
    assert lr_factor(0, 1, dataclasses.replace(BASE, warmup_steps=0)) == pytest.approx(1.0)


def test_polynomial_decays_with_its_power() -> None:
    config = dataclasses.replace(BASE, schedule=Schedule.polynomial, power=3.0, warmup_steps=0)
    assert lr_factor(50, 101, config) == pytest.approx(0.1 + 0.9 / 8)
    assert lr_factor(100, 101, config) == pytest.approx(0.1)


def test_wsd_is_constant_and_decays_at_the_end() -> None:
    rates = _rates(schedule=Schedule.wsd, decay_ratio=0.2)
    assert set(rates[10:80]) == {1.0}
    assert rates[-1] == pytest.approx(0.1)
    assert rates[89] == pytest.approx(1 - 0.9 / 2)
    assert rates[79:] == sorted(rates[79:], reverse=True)
    assert set(_rates(schedule=Schedule.wsd, decay_ratio=0.0)[10:]) == {1.0}
