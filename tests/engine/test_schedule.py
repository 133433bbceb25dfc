import dataclasses

import pytest

from fireflyds.config import OptimConfig, Schedule
from fireflyds.engine.schedule import learning_rate

BASE = OptimConfig(steps=100, lr=2.0, warmup_steps=10, min_lr_ratio=0.1)


def _rates(**changes) -> list[float]:
    config = dataclasses.replace(BASE, **changes)
    return [learning_rate(step, 100, config) for step in range(100)]


@pytest.mark.parametrize("schedule", [Schedule.cosine, Schedule.linear])
def test_decay_climbs_to_the_peak_and_ends_at_the_floor(schedule: Schedule) -> None:
    rates = _rates(schedule=schedule)
    assert rates[0] == pytest.approx(2.0 / 11)
    assert rates[10] == max(rates) == pytest.approx(2.0)
    assert rates[-1] == pytest.approx(0.2)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert len(set(rates[10:])) == 90
    assert 0 < rates[0] < rates[5] < rates[9]


def test_halfway_values() -> None:
    no_warmup = {"warmup_steps": 0}
    config = dataclasses.replace(BASE, schedule=Schedule.cosine, **no_warmup)
    assert learning_rate(50, 101, config) == pytest.approx(2.0 * 0.55)
    assert learning_rate(25, 101, dataclasses.replace(config, schedule=Schedule.linear)) == pytest.approx(
        2.0 * (1 - 0.9 / 4)
    )


def test_constant_has_no_warmup_unless_asked_by_steps() -> None:
    assert set(_rates(schedule=Schedule.constant, warmup_steps=None, warmup_ratio=0.1)) == {2.0}
    rates = _rates(schedule=Schedule.constant_with_warmup, warmup_steps=None, warmup_ratio=0.1)
    assert rates[9] < 2.0
    assert set(rates[10:]) == {2.0}


def test_one_step_runs() -> None:
    assert learning_rate(0, 1, dataclasses.replace(BASE, warmup_steps=0)) == pytest.approx(2.0)
