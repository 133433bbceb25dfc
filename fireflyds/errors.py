"""Errors that the user can correct. They are shown as one message, without a traceback."""


class UserError(ValueError):
    """Invalid input or environment. The message contains the field or file and line, the value, the rule, remedy."""

    exit_code = 2


class LostRankError(UserError):
    """Another rank or its host failed. The user's input is valid, and the same command resumes the run."""

    exit_code = 1
