"""The report of the doctor as text and as JSON, and the verb on the command line."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fireflyds.config import DoctorConfig
from fireflyds.distributed.timeouts import run_with_timeout
from fireflyds.doctor import check_report, signal_guards
from fireflyds.doctor.check import Check, Severity, failed, on_host, passed, warning, worst
from fireflyds.errors import UserError

ROOT = Path(__file__).parents[2]
HOSTS = ["n1", "n2", "n3"]


def _checks() -> list[Check]:
    disks = [
        on_host(host, [passed("disk", f"{speed} MiB/s", speed, "MiB/s")])[0]
        for host, speed in zip(HOSTS, (5, 6, 7), strict=True)
    ]
    cores = [on_host(host, [warning("cores", "1 of 8", "ask for more")])[0] for host in HOSTS]
    gpus = [*on_host("n1", [passed("gpus", "8 x H200")]), *on_host("n2", [failed("gpus", "none", "see nvidia-smi")])]
    return [*disks, *cores, *gpus, passed("ports", "open")]


def test_equal_findings_of_hosts_are_grouped_with_the_worst_first() -> None:
    assert check_report.format_checks(_checks(), HOSTS, coloured=False).splitlines() == [
        "disk               ok      n1 (similar on 2 more): 5 MiB/s",
        "cores              warning all hosts: 1 of 8",
        "                           -> ask for more",
        "gpus               error   n2: none",
        "                           -> see nvidia-smi",
        "gpus               ok      n1: 8 x H200",
        "ports              ok      open",
        "5 ok, 3 warnings, 1 errors",
    ]


def test_ok_findings_are_grouped_only_if_they_differ_in_numbers_alone() -> None:
    message_by_host = {"n1": "8 x A100, 80 GiB", "n2": "8 x A100, 79 GiB", "n3": "none; training runs on the CPU"}
    checks = [on_host(host, [passed("gpus", text)])[0] for host, text in message_by_host.items()]
    assert check_report.format_checks(checks, HOSTS, coloured=False).splitlines()[:-1] == [
        "gpus               ok      n1 (similar on 1 more): 8 x A100, 80 GiB",
        "gpus               ok      n3: none; training runs on the CPU",
    ]


def test_sigterm_is_raised_once_and_ignored_afterwards() -> None:
    def send_sigterm() -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    previous_handler = signal.getsignal(signal.SIGTERM)
    guard = signal_guards.sigterm_guard()
    try:
        received_signals = guard.__enter__()
        with pytest.raises(signal_guards.TerminatedError):
            send_sigterm()
        guard.__exit__(None, None, None)
        assert received_signals == [signal.SIGTERM]
        os.kill(os.getpid(), signal.SIGTERM)  # while the report is being printed
    finally:
        signal.signal(signal.SIGTERM, previous_handler)
    with signal_guards.sigterm_guard():
        pass
    assert signal.getsignal(signal.SIGTERM) is previous_handler


@pytest.mark.parametrize(
    ("action", "exit_code"), [(lambda: sys.exit(2), 2), (lambda: sys.exit(), 0), (lambda: 1 // 0, 1)]
)
def test_the_exit_guard_ends_the_process_at_once_with_the_exit_code(monkeypatch, action, exit_code: int) -> None:
    exit_codes = []
    monkeypatch.setattr(signal_guards, "end_process", exit_codes.append)
    with signal_guards.exit_guard():
        action()
    assert exit_codes == [exit_code]


def test_colours_are_optional_and_lines_fit_the_width_of_the_report() -> None:
    checks = [warning("cores", "word " * 60, "more " * 60)]
    report = check_report.format_checks(checks, ["n1"], coloured=False)
    assert max(map(len, report.splitlines())) <= check_report.WIDTH
    assert "\033" not in report
    assert "\033[33mwarning\033[0m" in check_report.format_checks(checks, ["n1"], coloured=True)


def test_json_holds_every_finding_of_every_host_in_one_line() -> None:
    text = check_report.checks_to_json(_checks(), 24, HOSTS, ["CPU"])
    assert "\n" not in text
    report = json.loads(text)
    assert (report["severity"], report["ranks"], report["hosts"], report["kernels"]) == ("error", 24, HOSTS, ["CPU"])
    assert [Check.from_dict(check) for check in report["checks"]] == _checks()


def test_the_severity_is_that_of_the_worst_finding() -> None:
    assert worst([]) is Severity.ok
    assert worst([passed("a", "b"), warning("a", "b", "c")]) is Severity.warning
    assert worst(_checks()) is Severity.error


def test_a_finding_has_a_remedy_exactly_if_it_is_not_ok() -> None:
    with pytest.raises(ValueError, match="disk: a remedy is required"):
        failed("disk", "full", "")
    with pytest.raises(ValueError, match="disk: a remedy is required"):
        Check("disk", Severity.ok, "fine", "buy another")


def test_run_with_timeout_times_out_and_passes_on_results_and_errors() -> None:
    assert run_with_timeout(5, lambda: 7) == 7
    with pytest.raises(ZeroDivisionError):
        run_with_timeout(5, lambda: 1 // 0)
    started = time.monotonic()
    with pytest.raises(TimeoutError, match="no answer within 0.1 s"):
        run_with_timeout(0.1, lambda: time.sleep(0.5))
    assert time.monotonic() - started < 0.4


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"timeout": 0.5}, "timeout=0.5: must be at least 1"),
        ({"all_reduce_mib": 0}, "all_reduce_mib=0: must be at least 1"),
        ({"disk_mib": -1}, "disk_mib=-1: must be at least 1"),
        ({"max_clock_skew": -1.0}, "max_clock_skew=-1.0: must be at least 0"),
        ({"runs": ""}, "runs: is empty. Give the folder"),
    ],
)
def test_invalid_values_are_named(values, message: str) -> None:
    with pytest.raises(UserError) as error_info:
        DoctorConfig(**values)
    assert message in str(error_info.value)


def test_output_of_libraries_is_kept_out_of_the_report(capfd) -> None:
    with check_report.exclusive_stdout() as report_stream:
        os.write(1, b"from C\n")
        print("the report", file=report_stream)
    print("later")
    stdout, stderr = capfd.readouterr()
    assert stdout == "the report\nlater\n"
    assert stderr == "from C\n"


def test_the_verb_prints_kernels_and_findings_and_exits_1_on_an_error(verb, tmp_path: Path) -> None:
    completed = verb("doctor", "disk_mib=1", "runs=a/b", "data=nowhere", check=False)
    assert completed.returncode == 1
    assert "packed_attention     float32" in completed.stdout
    for name in ("versions", "gpus", "disk", "variables", "ranks", "ports"):
        assert f"\n{name:<18} " in completed.stdout
    assert f"\n{'store':<18} error   data=nowhere: no token store there" in completed.stdout
    assert "1 errors" in completed.stdout.splitlines()[-1]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.4, 1.0, 2.0, 4.0, 7.0])
def test_an_interrupt_prints_no_traceback(tmp_path: Path, delay: float) -> None:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "launch" / "doctor.py"), "disk_mib=2048"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(delay)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert "Traceback" not in stderr
    # A signal before the interpreter has started ends the process by the signal.
    assert process.returncode in (130, -signal.SIGINT, 0), stderr
    assert process.returncode != 130 or "interrupted" in stderr
    assert list(tmp_path.iterdir()) == []
