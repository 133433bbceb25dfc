"""Ctrl-C, SIGTERM and the exit of a process that may have hanging threads."""

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
    """Ctrl-C ends what is inside as `KeyboardInterrupt`, also where a library makes another error of it, as transformers
    does when it is being imported."""
    asked: list[int] = []

    def ask(number: int, frame: Any) -> None:
        asked.append(number)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield
    except Exception:
        if asked:
            raise KeyboardInterrupt from None
        raise
    finally:
        signal.signal(signal.SIGINT, before)
    if asked:
        raise KeyboardInterrupt


class TerminatedError(BaseException):
    """SIGTERM came: what a launcher sends to all other ranks when one has died. Not an `Exception`: no part's failure."""


@contextlib.contextmanager
def sigterm_guard() -> Iterator[list[int]]:
    """SIGTERM raises `TerminatedError` inside, once, and is in the list that is yielded. The one after it is not heard any
    more, also afterwards: launchers give half a minute to say what is known."""
    asked: list[int] = []

    def end(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        asked.append(number)
        raise TerminatedError

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield asked
    finally:
        if not asked:
            signal.signal(signal.SIGTERM, before)


@contextlib.contextmanager
def exit_guard() -> Iterator[None]:
    """However what is inside ends the process, also by a refusal or Ctrl-C, `leave` does it."""
    try:
        yield
    except SystemExit as left:
        exit_now(left.code if isinstance(left.code, int) else int(left.code is not None))
    except TerminatedError:
        exit_now(128 + signal.SIGTERM)
    except Exception:
        traceback.print_exc()
        exit_now(1)


def exit_now(code: int) -> None:
    """End the process, also when something above never came back: its thread would hold up an ordinary exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    if has_hanging_threads():
        os._exit(code)
    sys.exit(code)
