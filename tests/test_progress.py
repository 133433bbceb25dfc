"""Progress is a bar on a terminal and a line now and then in a log."""

import os
import pty

import pytest

from fireflyds import progress


def test_a_log_gets_lines_with_rate_and_time_left(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress("prepare", 100_000_000) as bar:
        for second in (10, 20, 31, 40):
            now[0] = second
            bar.advance(10_000_000, rows=1000)
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["prepare: 30 of 100 MB, 3,000 rows, 1.0 MB/s, 1 min left"]


def test_short_work_is_silent_in_a_log(capsys: pytest.CaptureFixture[str]) -> None:
    assert list(progress.counted("learn", ["字" * 100, "a"] * 10_000)) == ["字" * 100, "a"] * 10_000
    assert capsys.readouterr().err == ""


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = pty.openpty()
    with os.fdopen(writer, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with progress.Progress("prepare", 2_000_000) as bar:
            bar.advance(1_000_000, rows=7)
        terminal.flush()
        shown = b""
        while b"rows" not in shown:  # one read may return a part
            shown += os.read(reader, 1 << 16)
    assert b"prepare" in shown
    assert b"1 of 2 MB, 7 rows" in shown
