"""Alternatives timed in turns in one process, so that load on the machine affects all of them alike."""

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path


def interleaved(alternatives: dict[str, Callable[[], object]], rounds: int = 7) -> dict[str, tuple[float, float]]:
    """Milliseconds of each alternative, minimum and median of `rounds`, after one turn that does not count."""
    times: dict[str, list[float]] = {name: [] for name in alternatives}
    for turn in range(rounds + 1):
        for name, run in alternatives.items():
            start = time.perf_counter()
            run()
            if turn:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: (min(values), statistics.median(values)) for name, values in times.items()}


def load() -> str:
    """The machine's load, for the head of a table."""
    return f"load {os.getloadavg()[0]:.1f}"


def reset_peak() -> None:
    """Start to measure `peak_megabytes` anew: a child otherwise begins with its parent's."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_megabytes() -> float:
    """The most memory this process has held since `reset_peak`."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1024


def in_own_process(script: str, *arguments: str) -> str:
    """The output of a script in a fresh process, for measurements of memory."""
    completed = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, check=True)
    return completed.stdout.strip()


def table(title: str, columns: list[str], rows: list[list[str]]) -> str:
    """A Markdown table under a heading."""
    lines = [f"## {title}", "", "| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows), ""])
