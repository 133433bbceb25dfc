"""What a key may be, typed by the schema of training, as a range that trials are drawn from."""

import itertools
import types
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from fireflyds.app import unknown_key
from fireflyds.config import RangeConfig, TrainConfig
from fireflyds.errors import UserError

Value = bool | int | float | str | None


def type_of(key: str) -> type | None:
    """The type of a dotted key of `train`; None where it may be anything, as in `model.architecture`.

    Raises:
        UserError: there is no such key.
    """
    found: Any = TrainConfig
    for part in key.split("."):
        if is_dataclass(found):
            found = get_type_hints(found).get(part)
        elif get_origin(found) is dict:
            found = get_args(found)[1]
        elif found is not Any:
            found = None
        if found is None:
            raise UserError(f"sweep.space.{unknown_key('train', key)}")
    if get_origin(found) in (Union, types.UnionType):
        found = next(kind for kind in get_args(found) if kind is not types.NoneType)
    return None if found is Any else found


def values(key: str, one: RangeConfig) -> list[Value]:
    """What a range must be tried with before anything is started: its ends, or every choice."""
    if one.choices:
        return one.choices
    whole = _whole(key, one)
    assert one.low is not None
    assert one.high is not None
    return [int(end) if whole else end for end in (one.low, one.high)]


def ladder(key: str, one: RangeConfig) -> list[Value]:
    """All values of a range with steps."""
    if one.choices:
        return one.choices
    assert one.low is not None
    assert one.high is not None
    assert one.step is not None
    # Counted, not summed: 0.1 three times is not 0.3.
    count = int((one.high - one.low) / one.step + 1e-9) + 1
    found = [one.low + place * one.step for place in range(count)]
    return [round(value) for value in found] if _whole(key, one) else [float(f"{value:.12g}") for value in found]


def combinations(space: Mapping[str, RangeConfig]) -> Iterator[dict[str, Value]]:
    """Every combination, for a grid."""
    for found in itertools.product(*(ladder(key, one) for key, one in space.items())):
        yield dict(zip(space, found, strict=True))


def _whole(key: str, one: RangeConfig) -> bool:
    """Raises `UserError` where a range does not fit the key's type."""
    kind = type_of(key)
    if kind not in (int, float):
        name = "may be anything" if kind is None else f"is of type {kind.__name__}"
        raise UserError(f"sweep.space.{key}: low and high are for numbers, and the key {name}. Give choices=[...]")
    given = (one.low, one.high, one.step)
    if kind is int and any(value is not None and value != int(value) for value in given):
        raise UserError(
            f"sweep.space.{key}: the key takes whole numbers, got low={one.low}, high={one.high}, step={one.step}"
        )
    return kind is int


def words(params: Mapping[str, Value]) -> list[str]:
    """As a person would type them."""
    shown = {True: "true", False: "false", None: "null"}
    return [
        f"{key}={shown[value] if value is None or isinstance(value, bool) else value}" for key, value in params.items()
    ]
