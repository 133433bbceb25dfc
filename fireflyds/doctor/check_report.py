"""Formats all check results as text or as JSON."""

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
_NAME_WIDTH = 18
_COLOURS = {"ok": "\033[32m", "warning": "\033[33m", "error": "\033[31m"}


@contextlib.contextmanager
def exclusive_stdout() -> Iterator[TextIO]:
    """Yields the stdout stream of the report. Other output to stdout, also from C libraries (NCCL), goes to stderr."""
    sys.stdout.flush()
    stdout_fd = os.dup(1)
    os.dup2(2, 1)
    try:
        with open(stdout_fd, "w", encoding="utf-8", closefd=False) as stream:
            yield stream
    finally:
        sys.stdout.flush()
        os.dup2(stdout_fd, 1)
        os.close(stdout_fd)


def checks_to_json(checks: list[Check], ranks: int, hosts: list[str], kernels: list[str]) -> str:
    """The report as one line of JSON."""
    document = {
        "severity": worst(checks).name,
        "ranks": ranks,
        "hosts": hosts,
        "checks": [check.to_dict() for check in checks],
        "kernels": kernels,
    }
    return json.dumps(document, ensure_ascii=False)


def format_checks(checks: list[Check], hosts: list[str], *, coloured: bool) -> str:
    """The report as text: per name the most severe check first; a result that hosts share is printed once."""
    lines = []
    for check, host_prefix in _group_checks(checks, hosts):
        severity = check.severity.name
        label = f"{_COLOURS[severity]}{severity:<7}\033[0m" if coloured else f"{severity:<7}"
        head, indent = f"{check.name:<{_NAME_WIDTH}} ", " " * (_NAME_WIDTH + 9)
        message_lines = textwrap.wrap(
            host_prefix + check.message, WIDTH - len(indent), break_long_words=False, break_on_hyphens=False
        )
        lines.append(f"{head}{label} {message_lines[0] if message_lines else ''}".rstrip())
        lines += [indent + line for line in message_lines[1:]]
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


def _group_checks(checks: list[Check], hosts: list[str]) -> list[tuple[Check, str]]:
    """Checks by name, in order of first appearance, each with a prefix that names its hosts. Passed checks that differ
    only in numbers are represented by the first one."""
    names = list(dict.fromkeys(check.name for check in checks))
    rows = []
    for name in names:
        groups: dict[tuple[Severity, str], list[Check]] = {}
        for check in checks:
            if check.name == name:
                # Digits within a name, such as `A100`, are kept.
                group_key = re.sub(r"(?<![A-Za-z])\d[\d.,]*", "", check.message) if check.host else check.message
                group_key = group_key if check.severity is Severity.ok else check.message + check.remedy
                groups.setdefault((check.severity, group_key), []).append(check)
        for _, group in sorted(groups.items(), key=lambda item: -item[0][0]):
            rows.append((group[0], _format_hosts(group, hosts, varies=len({member.message for member in group}) > 1)))
    return rows


def _format_hosts(group: list[Check], hosts: list[str], *, varies: bool) -> str:
    names = [check.host for check in group if check.host]
    if len(hosts) < 2 or not names:
        return ""
    if varies:
        return f"{names[0]} (similar on {len(names) - 1} more): "
    if len(names) == len(hosts):
        return "all hosts: "
    return f"{', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}: "
