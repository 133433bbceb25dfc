"""The error a person can mend. It is shown as one message, without a traceback."""


class UserError(ValueError):
    """The user's mistake. The message names the field or file and line, the value, the rule and the remedy."""
