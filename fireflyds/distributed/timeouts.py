"""Timeouts for work that may block forever, such as access to an unresponsive network drive."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


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
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:g} s")
    if failures:
        raise failures[0]
    return results[0]
