"""Timeouts for work that may block forever, such as access to an unresponsive network drive."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")
_threads: list[threading.Thread] = []


def run_with_timeout(seconds: float, work: Callable[[], T]) -> T:
    """Returns the result of `work`, or raises its exception. It runs in a thread, so that Ctrl-C is handled meanwhile.

    Raises:
        TimeoutError: it has not returned within `seconds`; its thread keeps running.
    """
    results: list[T] = []
    failures: list[BaseException] = []

    def run() -> None:
        try:
            results.append(work())
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=run, daemon=True)
    _threads.append(thread)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    _threads.remove(thread)
    if failures:
        raise failures[0]
    return results[0]


def has_hanging_threads() -> bool:
    """True while work that timed out is still running: it would block a normal exit."""
    return any(thread.is_alive() for thread in _threads)
