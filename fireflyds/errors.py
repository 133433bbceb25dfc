"""The error a person can mend. It is shown as one message, without a traceback."""


class UserError(ValueError):
    """The user's mistake. The message names the field or file and line, the value, the rule and the remedy."""

    exit_code = 2


class LostRankError(UserError):
    """Another rank or its machine is gone: nothing that a user wrote is wrong, and the same command goes on."""

    exit_code = 1
