"""Errors that the user can correct. They are shown as one message, without a traceback."""

import copy
from typing import Any, Self

_UNSET = object()


class UserError(ValueError):
    """Invalid input or environment.

    The message is `key=value: rule. remedy`, of the parts that are given; the parts are attributes for readers other
    than people. `key` is a configuration key, a file or `file:line`, `value` what was given for it, `rule` what is
    wrong or what must hold, `remedy` what to do about it.
    """

    exit_code = 2
    kind = "user_error"
    """The kind of failure in `status.json`."""

    def __init__(self, rule: str, *, key: object = "", value: object = _UNSET, remedy: str = "") -> None:
        super().__init__(rule)
        self.key, self.rule, self.remedy = str(key), rule, remedy
        self.value = None if value is _UNSET else str(value)
        self.context = ""

    @property
    def finding(self) -> str:
        """The message without the remedy."""
        subject = self.key if self.value is None else f"{self.key}={self.value}"
        return ": ".join(part for part in (self.context, subject, self.rule) if part)

    def __str__(self) -> str:
        return f"{self.finding}. {self.remedy}" if self.remedy else self.finding

    def within(self, context: str) -> Self:
        """Returns the same error with `context` (such as `step 12`) before its message."""
        error = copy.copy(self)
        error.context = ": ".join(part for part in (context, self.context) if part)
        return error

    def as_dict(self) -> dict[str, Any]:
        """The kind and the attributes, as JSON values."""
        return {"kind": self.kind} | vars(self)

    @staticmethod
    def from_dict(fields: dict[str, Any]) -> "UserError":
        """The error whose `as_dict` gave `fields`, of the class with this `kind`."""
        classes = {error_class.kind: error_class for error_class in (UserError, LostRankError, DivergedError)}
        error = classes[fields["kind"]](fields["rule"])
        vars(error).update({name: value for name, value in fields.items() if name != "kind"})
        return error


def describe(error: BaseException) -> str:
    """The class and message of any error; a `UserError` without its remedy."""
    if isinstance(error, UserError):
        return error.finding
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


class LostRankError(UserError):
    """Another rank or its host failed. The user's input is valid, and the same command resumes the run.

    `rank` is the lost rank, where one is known.
    """

    exit_code = 1
    kind = "lost_rank"

    def __init__(
        self, rule: str, *, key: object = "", value: object = _UNSET, rank: int | None = None, remedy: str = ""
    ) -> None:
        super().__init__(rule, key=key, value=value, remedy=remedy)
        self.rank = rank


class DivergedError(UserError):
    """The loss or the gradients are not finite, or the loss keeps spiking: other settings or data are needed."""

    kind = "diverged"
