"""Handling of Ctrl-C and SIGTERM, and the exit of a process that may have hanging threads."""

import contextlib
import os
import signal
import sys
import traceback
from collections.abc import Iterator
from typing import Any

from fireflyds.distributed.timeouts import has_hanging_threads


@contextlib.contextmanager
def sigint_guard() -> Iterator[None]:
    """Raises `KeyboardInterrupt` on Ctrl-C within the block, also where a library converts it to another exception, as
    transformers does during its import."""
    received: list[int] = []

    def handle_sigint(number: int, frame: Any) -> None:
        received.append(number)
        raise KeyboardInterrupt

    previous_handler = signal.signal(signal.SIGINT, handle_sigint)
    try:
        yield
    except Exception:
        if received:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, previous_handler)
    if received:
        raise KeyboardInterrupt


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
    """Ends the process with `exit_now` where the block raises `SystemExit`, receives SIGTERM or fails."""
    try:
        yield
    except SystemExit as error:
        exit_now(error.code if isinstance(error.code, int) else int(error.code is not None))
    except TerminatedError:
        exit_now(128 + signal.SIGTERM)
    except Exception:
        traceback.print_exc()
        exit_now(1)


def exit_now(code: int) -> None:
    """Ends the process, also if threads that timed out are still running: they would block an ordinary exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    if has_hanging_threads():
        os._exit(code)
    sys.exit(code)
