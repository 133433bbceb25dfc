"""Result of one check: severity, message and remedy."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from enum import IntEnum
from typing import Any


class Severity(IntEnum):
    """`warning`: training works, but is slower or limited; `error`: training fails or gives wrong results."""

    ok = 0
    warning = 1
    error = 2


@dataclass(frozen=True, slots=True)
class Check:
    """Result of one check. `host` is empty where it concerns all ranks together."""

    name: str
    severity: Severity
    message: str
    remedy: str = ""
    host: str = ""
    value: float | None = None
    """The measured value, in units of `unit`."""
    unit: str = ""

    def __post_init__(self) -> None:
        if (self.severity is Severity.ok) == bool(self.remedy):
            raise ValueError(f"{self.name}: a remedy is required for warnings and errors, and not allowed otherwise")

    def to_dict(self) -> dict[str, Any]:
        """The check as a JSON object; `severity` by name."""
        return asdict(self) | {"severity": self.severity.name}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Check":
        """Inverse of `to_dict`."""
        return cls(**{**values, "severity": Severity[values["severity"]]})


def passed(name: str, message: str, value: float | None = None, unit: str = "") -> Check:
    """A check without findings; `value` is in units of `unit`."""
    return Check(name, Severity.ok, message, "", "", value, unit)


def warning(name: str, message: str, remedy: str, value: float | None = None, unit: str = "") -> Check:
    """A check that found a limitation, with its remedy; `value` is in units of `unit`."""
    return Check(name, Severity.warning, message, remedy, "", value, unit)


def failed(name: str, message: str, remedy: str) -> Check:
    """A check that found an error, with its remedy."""
    return Check(name, Severity.error, message, remedy)


def on_host(host: str, checks: Iterable[Check]) -> list[Check]:
    """Returns copies of the checks with `host` set."""
    return [replace(check, host=host) for check in checks]


def worst(checks: Iterable[Check]) -> Severity:
    """The highest severity of the checks; `ok` where there are none."""
    return max((check.severity for check in checks), default=Severity.ok)
