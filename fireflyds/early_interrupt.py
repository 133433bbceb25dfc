"""Ctrl-C while a verb still imports its modules ends with one line, as it does later (`app.main`). Imported first."""

import sys
from types import TracebackType

MESSAGE = "interrupted: what is whole stays; give the same command again"
EXIT_CODE = 130


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        print(MESSAGE, file=sys.stderr, flush=True)
    else:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _show
