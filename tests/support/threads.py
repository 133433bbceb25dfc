"""Ranks as threads of one process."""

import threading
from collections.abc import Callable, Iterable


def each_in_its_thread(ranks: Iterable[int], work: Callable[[int], None]) -> None:
    """`work(rank)` for all at the same time, in threads named by rank; none may take longer than a minute."""
    threads = [threading.Thread(target=work, args=(rank,), name=str(rank)) for rank in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
