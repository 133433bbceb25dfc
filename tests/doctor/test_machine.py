"""Disk, limits and variables of a host, each with the values that are a warning or an error."""

import os
import threading
import time
from pathlib import Path

import pytest

from fireflyds.config import DoctorConfig
from fireflyds.distributed.shared_folder import existing_part
from fireflyds.doctor import machine
from fireflyds.doctor.check import Severity

GIB = 1 << 30


def _disk(folder, **options):
    return machine.check_disk(DoctorConfig(**{"runs": str(folder), "disk_mib": 3, "min_free_gib": 0, **options}))


def test_a_disk_is_written_and_read_and_no_file_is_left(tmp_path) -> None:
    check = _disk(tmp_path / "not" / "yet", min_disk_mib_s=0)
    assert check.severity is Severity.ok
    assert check.value is not None
    assert check.value > 1
    assert check.message.startswith(f"{tmp_path}: ")
    assert list(tmp_path.iterdir()) == []


def test_a_full_or_slow_disk_is_a_warning_and_one_without_space_for_the_test_an_error(tmp_path) -> None:
    full_check = _disk(tmp_path, min_free_gib=1e9)
    assert full_check.severity is Severity.warning
    assert "min_free_gib" in full_check.remedy
    slow_check = _disk(tmp_path, min_disk_mib_s=1e9)
    assert slow_check.severity is Severity.warning
    assert "min_disk_mib_s" in slow_check.remedy
    assert _disk(tmp_path, disk_mib=1 << 40).severity is Severity.error


def test_a_folder_that_cannot_be_written_is_an_error(tmp_path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    assert "is a file" in _disk(tmp_path / "file" / "runs").message
    read_only = tmp_path / "locked"
    read_only.mkdir(mode=0o500)
    if os.geteuid() == 0:  # root may write anywhere

        def raise_permission_error(*arguments, **options):
            raise PermissionError(13, "Permission denied")

        monkeypatch.setattr(machine.tempfile, "TemporaryFile", raise_permission_error)
    check = _disk(read_only)
    assert check.severity is Severity.error
    assert check.message == f"runs={read_only}: cannot be read and written (Permission denied)"


@pytest.mark.parametrize("function_name", ["speeds", "existing_part"])
def test_a_disk_that_hangs_is_an_error_within_the_timeout(tmp_path, monkeypatch, function_name: str) -> None:
    release = threading.Event()
    monkeypatch.setattr(machine, function_name, lambda *arguments: release.wait(30) and tmp_path)
    started = time.monotonic()
    check = _disk(tmp_path, timeout=1)
    assert time.monotonic() - started < 10
    release.set()
    assert check.severity is Severity.error
    assert "not written and read within 1 s" in check.message


def test_a_stale_file_handle_is_an_error(tmp_path, monkeypatch) -> None:
    def raise_stale_handle(self, *arguments, **options):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr(Path, "exists", raise_stale_handle)
    check = _disk(tmp_path)
    assert check.severity is Severity.error
    assert check.message == f"runs={tmp_path}: cannot be read and written (Stale file handle)"


@pytest.mark.parametrize(
    ("limit_bytes", "gpus", "severity"),
    [(None, 8, Severity.ok), (8 << 20, 8, Severity.warning), (8 << 20, 0, Severity.ok)],
)
def test_locked_memory_is_checked_only_with_gpus(limit_bytes, gpus: int, severity: Severity) -> None:
    assert machine.check_memlock(limit_bytes, gpus, 2).severity is severity


@pytest.mark.parametrize(
    ("free_bytes", "ranks", "gpus", "severity"),
    [
        (8 * GIB, 8, 8, Severity.ok),
        (64 << 20, 8, 8, Severity.error),
        (64 << 20, 1, 8, Severity.warning),
        (64 << 20, 1, 1, Severity.ok),
        (64 << 20, 2, 0, Severity.ok),
    ],
)
def test_nccl_needs_shared_memory(free_bytes: int, ranks: int, gpus: int, severity: Severity) -> None:
    assert machine.check_shared_memory(free_bytes, ranks, gpus).severity is severity


def test_a_low_limit_of_open_files_is_a_warning() -> None:
    assert machine.check_open_files(1024).severity is Severity.warning
    assert machine.check_open_files(65536).severity is Severity.ok
    assert machine.check_open_files(None).severity is Severity.ok


@pytest.mark.parametrize(
    ("allowed_cores", "ranks", "threads", "gpus", "severity"),
    [
        (64, 8, None, 8, Severity.ok),
        (64, 8, "8", 8, Severity.ok),
        (64, 8, "16", 8, Severity.warning),
        (64, 8, "1", 8, Severity.warning),
        (64, 8, "1", 0, Severity.ok),  # `start` sets torch's threads there
        (1, 8, None, 8, Severity.warning),
        (64, 8, "all", 8, Severity.error),
        (64, 8, "0", 8, Severity.error),
    ],
)
def test_cores_and_threads_fit_the_ranks(
    allowed_cores: int, ranks: int, threads, gpus: int, severity: Severity
) -> None:
    assert machine.check_cores(allowed_cores, 64, ranks, threads, gpus).severity is severity


@pytest.mark.parametrize(
    ("environment", "hosts", "severity", "message"),
    [
        ({}, 2, Severity.ok, "NCCL's own choices"),
        ({"NCCL_SOCKET_IFNAME": "eth"}, 2, Severity.ok, "NCCL_SOCKET_IFNAME=eth"),
        ({"NCCL_SOCKET_IFNAME": "^docker0,lo"}, 2, Severity.ok, ""),
        ({"NCCL_SOCKET_IFNAME": "=eth"}, 2, Severity.error, "names no interface of this host (eth0, lo)"),
        ({"GLOO_SOCKET_IFNAME": "ib0"}, 1, Severity.error, "names no interface"),
        ({"GLOO_SOCKET_IFNAME": "eth"}, 2, Severity.error, "gloo takes whole names only"),
        ({"GLOO_SOCKET_IFNAME": "=eth0"}, 2, Severity.error, "gloo takes whole names only"),
        ({"GLOO_SOCKET_IFNAME": "^lo"}, 2, Severity.error, "gloo takes whole names only"),
        ({"GLOO_SOCKET_IFNAME": "eth0,ib0"}, 2, Severity.error, ": ib0; gloo"),
        ({"GLOO_SOCKET_IFNAME": "eth0"}, 2, Severity.ok, ""),
        ({"NCCL_SOCKET_IFNAME": "=eth0"}, 2, Severity.ok, ""),
        ({"NCCL_SOCKET_IFNAME": "lo"}, 2, Severity.error, "cannot reach another host"),
        ({"GLOO_SOCKET_IFNAME": "lo"}, 2, Severity.error, "cannot reach another host"),
        ({"GLOO_SOCKET_IFNAME": "lo"}, 1, Severity.ok, ""),
        ({"NCCL_P2P_DISABLE": "1"}, 1, Severity.warning, "instead of NVLink"),
        ({"NCCL_P2P_DISABLE": "0"}, 1, Severity.ok, ""),
        ({"NCCL_ALGO": "Tree"}, 1, Severity.warning, "own choice"),
        ({"TORCH_NCCL_ASYNC_ERROR_HANDLING": "0"}, 1, Severity.warning, "hangs"),
        ({"CUDA_LAUNCH_BLOCKING": "1"}, 1, Severity.warning, "waits"),
        ({"TORCH_DISTRIBUTED_DEBUG": "detail"}, 1, Severity.warning, "every collective"),
    ],
)
def test_suspicious_variables_are_named(environment, hosts: int, severity: Severity, message: str) -> None:
    check = machine.check_variables(environment, ["lo", "eth0"], hosts)
    assert check.severity is severity
    assert message in check.message
    assert severity is Severity.ok or next(iter(environment)) in check.remedy


def test_existing_part_is_the_existing_parent_of_a_path(tmp_path) -> None:
    assert existing_part(str(tmp_path / "a" / "b")) == tmp_path.resolve()
