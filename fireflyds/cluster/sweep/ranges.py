"""Ranges of keys from which trials are sampled, typed by the schema of `train`."""

import itertools
import types
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from typing import Any, Union, get_args, get_origin, get_type_hints

from fireflyds.config import RangeConfig, TrainConfig
from fireflyds.errors import UserError
from fireflyds.overrides import unknown_key

Value = bool | int | float | str | None


def type_of(key: str) -> type | None:
    """Returns the type of a dotted key of `train`; None where any type is allowed, as in `model.architecture`.

    Raises:
        UserError: the key does not exist.
    """
    key_type: Any = TrainConfig
    for part in key.split("."):
        if is_dataclass(key_type):
            key_type = get_type_hints(key_type).get(part)
        elif get_origin(key_type) is dict:
            key_type = get_args(key_type)[1]
        elif key_type is not Any:
            key_type = None
        if key_type is None:
            raise unknown_key("train", key, "sweep.space.")
    if get_origin(key_type) in (Union, types.UnionType):
        key_type = next(kind for kind in get_args(key_type) if kind is not types.NoneType)
    return None if key_type is Any else key_type


def values(key: str, one: RangeConfig) -> list[Value]:
    """Returns the values to validate before the first trial starts: the ends of the range, or every choice."""
    if one.choices:
        return one.choices
    is_whole = _takes_whole_numbers(key, one)
    assert one.low is not None
    assert one.high is not None
    return [int(end) if is_whole else end for end in (one.low, one.high)]


def ladder(key: str, one: RangeConfig) -> list[Value]:
    """Returns all values of a range with a step."""
    if one.choices:
        return one.choices
    assert one.low is not None
    assert one.high is not None
    assert one.step is not None
    # Multiples of the step, not a running sum: 0.1 + 0.1 + 0.1 is not 0.3.
    count = int((one.high - one.low) / one.step + 1e-9) + 1
    numbers = [one.low + index * one.step for index in range(count)]
    return (
        [round(value) for value in numbers]
        if _takes_whole_numbers(key, one)
        else [float(f"{value:.12g}") for value in numbers]
    )


def combinations(space: Mapping[str, RangeConfig]) -> Iterator[dict[str, Value]]:
    """Yields every combination of values, for a grid search."""
    for combination in itertools.product(*(ladder(key, key_range) for key, key_range in space.items())):
        yield dict(zip(space, combination, strict=True))


def _takes_whole_numbers(key: str, key_range: RangeConfig) -> bool:
    """True where the key takes whole numbers. Raises `UserError` if the range does not fit the type of the key."""
    kind = type_of(key)
    if kind not in (int, float):
        name = "may be anything" if kind is None else f"is of type {kind.__name__}"
        raise UserError(
            f"low and high are for numbers, and the key {name}", key=f"sweep.space.{key}", remedy="Give choices=[...]"
        )
    bounds = (key_range.low, key_range.high, key_range.step)
    if kind is int and any(value is not None and value != int(value) for value in bounds):
        raise UserError(
            f"the key takes whole numbers, got low={key_range.low}, high={key_range.high}, step={key_range.step}",
            key=f"sweep.space.{key}",
            remedy="Give whole numbers",
        )
    return kind is int


def words(params: Mapping[str, Value]) -> list[str]:
    """Returns the parameters as `key=value` arguments of the command line."""
    literals = {True: "true", False: "false", None: "null"}
    return [
        f"{key}={literals[value] if value is None or isinstance(value, bool) else value}"
        for key, value in params.items()
    ]
