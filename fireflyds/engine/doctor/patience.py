"""Waiting for what may never come: a dead network drive, a collective that one rank does not join."""

import contextlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

T = TypeVar("T")
_hung: list[threading.Thread] = []


@contextlib.contextmanager
def heeding_interrupts() -> Iterator[None]:
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
def heeding_termination() -> Iterator[list[int]]:
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


def within(seconds: float, work: Callable[[], T]) -> T:
    """What `work` returns or raises, waited for no longer than that. Ctrl-C is heard meanwhile.

    Raises:
        TimeoutError: it has not come back; its thread is left behind.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    _hung.append(thread)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    _hung.remove(thread)
    if failures:
        raise failures[0]
    return results[0]


@contextlib.contextmanager
def leaving() -> Iterator[None]:
    """However what is inside ends the process, also by a refusal or Ctrl-C, `leave` does it."""
    try:
        yield
    except SystemExit as left:
        leave(left.code if isinstance(left.code, int) else int(left.code is not None))
    except TerminatedError:
        leave(128 + signal.SIGTERM)
    except Exception:
        traceback.print_exc()
        leave(1)


def leave(code: int) -> None:
    """End the process, also when something above never came back: its thread would hold up an ordinary exit."""
    sys.stdout.flush()
    sys.stderr.flush()
    if any(thread.is_alive() for thread in _hung):
        os._exit(code)
    sys.exit(code)
