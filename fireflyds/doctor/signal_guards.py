"""Handling of SIGTERM, and the exit of a process that may have hanging threads."""

import contextlib
import signal
import traceback
from collections.abc import Iterator
from typing import Any

from fireflyds.exit_handling import end_process


class TerminatedError(BaseException):
    """SIGTERM was received: launchers send it to all other ranks when one has failed. Not an `Exception`, so that the
    handlers of failed checks do not catch it."""


@contextlib.contextmanager
def sigterm_guard() -> Iterator[list[int]]:
    """Raises `TerminatedError` on the first SIGTERM within the block and appends the signal to the yielded list.

    Later ones are ignored, also after the block: launchers wait 30 seconds before SIGKILL, enough to print a partial
    report.
    """
    received: list[int] = []

    def handle_sigterm(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        received.append(number)
        raise TerminatedError

    previous_handler = signal.signal(signal.SIGTERM, handle_sigterm)
    try:
        yield received
    finally:
        if not received:
            signal.signal(signal.SIGTERM, previous_handler)


@contextlib.contextmanager
def exit_guard() -> Iterator[None]:
    """Ends the process at once where the block raises `SystemExit`, receives SIGTERM or fails: threads of checks that
    timed out may still be running and would block an ordinary exit."""
    try:
        yield
    except SystemExit as error:
        end_process(error.code if isinstance(error.code, int) else int(error.code is not None))
    except TerminatedError:
        end_process(128 + signal.SIGTERM)
    except Exception:
        traceback.print_exc()
        end_process(1)
