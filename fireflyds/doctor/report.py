"""All findings, for people or for programs."""

import contextlib
import json
import os
import re
import sys
import textwrap
from collections.abc import Iterator
from typing import TextIO

from fireflyds.doctor.check import Check, Severity, worst

WIDTH = 120
_NAME = 18
_COLOURS = {"ok": "\033[32m", "warning": "\033[33m", "error": "\033[31m"}


@contextlib.contextmanager
def exclusive_stdout() -> Iterator[TextIO]:
    """Where the report goes. What libraries print meanwhile, NCCL's own code included, goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(kept, "w", encoding="utf-8", closefd=False) as stream:
            yield stream
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


def checks_to_json(checks: list[Check], ranks: int, hosts: list[str], kernels: list[str]) -> str:
    """One line."""
    document = {
        "severity": worst(checks).name,
        "ranks": ranks,
        "hosts": hosts,
        "checks": [check.to_dict() for check in checks],
        "kernels": kernels,
    }
    return json.dumps(document, ensure_ascii=False)


def format_checks(checks: list[Check], hosts: list[str], *, coloured: bool) -> str:
    """For people: the worst of each name first within it; what several hosts have in common once."""
    lines = []
    for check, where in _together(checks, hosts):
        severity = check.severity.name
        shown = f"{_COLOURS[severity]}{severity:<7}\033[0m" if coloured else f"{severity:<7}"
        head, indent = f"{check.name:<{_NAME}} ", " " * (_NAME + 9)
        found = textwrap.wrap(
            where + check.message, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False
        )
        lines.append(f"{head}{shown} {found[0] if found else ''}".rstrip())
        lines += [indent + line for line in found[1:]]
        if check.remedy:
            lines += textwrap.wrap(
                f"-> {check.remedy}",
                WIDTH,
                initial_indent=indent,
                subsequent_indent=f"{indent}   ",
                break_long_words=False,
                break_on_hyphens=False,
            )
    counts = [sum(check.severity is severity for check in checks) for severity in Severity]
    lines.append(f"{counts[0]} ok, {counts[1]} warnings, {counts[2]} errors")
    return "\n".join(lines)


def _together(checks: list[Check], hosts: list[str]) -> list[tuple[Check, str]]:
    """Findings in the order of their names, each with the hosts it is of. Those that are ok and that differ in numbers
    only are shown by the first."""
    names = list(dict.fromkeys(check.name for check in checks))
    rows = []
    for name in names:
        alike: dict[tuple[Severity, str], list[Check]] = {}
        for check in checks:
            if check.name == name:
                # Not the number in `A100`, which is a name.
                told = re.sub(r"(?<![A-Za-z])\d[\d.,]*", "", check.message) if check.host else check.message
                told = told if check.severity is Severity.ok else check.message + check.remedy
                alike.setdefault((check.severity, told), []).append(check)
        for _, group in sorted(alike.items(), key=lambda item: -item[0][0]):
            rows.append((group[0], _place(group, hosts, varies=len({each.message for each in group}) > 1)))
    return rows


def _place(group: list[Check], hosts: list[str], *, varies: bool) -> str:
    of = [check.host for check in group if check.host]
    if len(hosts) < 2 or not of:
        return ""
    if varies:
        return f"{of[0]} (as good on {len(of) - 1} more): "
    if len(of) == len(hosts):
        return "all hosts: "
    return f"{', '.join(of[:4])}{f' and {len(of) - 4} more' if len(of) > 4 else ''}: "
