"""A finding."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import Any


class Verdict(IntEnum):
    """`yellow` runs, but slower or with less than could be; `red` does not run, or not rightly."""

    green = 0
    yellow = 1
    red = 2


@dataclass(frozen=True, slots=True)
class Check:
    """One finding. `host` is empty where it is of all ranks together."""

    name: str
    verdict: Verdict
    found: str
    remedy: str = ""
    host: str = ""
    value: float | None = None
    """The measured number, in the unit that `unit` names."""
    unit: str = ""

    def __post_init__(self) -> None:
        if (self.verdict is Verdict.green) == bool(self.remedy):
            raise ValueError(f"{self.name}: a remedy belongs to yellow and red findings, and to all of them")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"verdict": self.verdict.name}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Check":
        return cls(**{**values, "verdict": Verdict[values["verdict"]]})


def green(name: str, found: str, value: float | None = None, unit: str = "") -> Check:
    return Check(name, Verdict.green, found, "", "", value, unit)


def yellow(name: str, found: str, remedy: str, value: float | None = None, unit: str = "") -> Check:
    return Check(name, Verdict.yellow, found, remedy, "", value, unit)


def red(name: str, found: str, remedy: str) -> Check:
    return Check(name, Verdict.red, found, remedy)


def at(host: str, checks: Iterable[Check]) -> list[Check]:
    """The same findings, of that host."""
    return [replace(check, host=host) for check in checks]


def worst(checks: Iterable[Check]) -> Verdict:
    return max((check.verdict for check in checks), default=Verdict.green)
