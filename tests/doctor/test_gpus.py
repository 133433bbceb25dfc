"""Checks of GPUs: compute capability, kernels of the torch build, and build tools."""

import pytest

from fireflyds.doctor import gpus
from fireflyds.doctor.check import Severity
from fireflyds.doctor.gpus import Gpu, TorchBuild

CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
V100, A100, H200 = (Gpu(n, c, m, m - 0.5) for n, c, m in (("V100", 70, 32), ("A100", 80, 80), ("H200", 90, 139)))


@pytest.mark.parametrize(
    ("capability", "archs", "supported"),
    [
        (70, CU126, True),
        (70, CU130, False),
        (89, CU130, True),  # sm_86 runs on 8.9
        (80, ("sm_86",), False),
        (103, CU130, True),
        (103, ("sm_100a",), False),
        (90, ("sm_90a",), True),
        (130, CU130, True),  # from PTX
        (121, ("sm_90",), False),
    ],
)
def test_kernels_support_their_major_version_and_ptx_all_newer_ones(capability: int, archs, supported: bool) -> None:
    assert gpus.has_kernels(capability, archs) is supported


def test_a_torch_build_without_volta_kernels_is_an_error_on_v100_and_names_a_wheel() -> None:
    assert gpus.check_kernels_for(TorchBuild("2.14.0", "12.6", CU126), [V100]).severity is Severity.ok
    check = gpus.check_kernels_for(TorchBuild("2.15.0", "13.0", CU130), [V100, H200])
    assert check.severity is Severity.error
    assert "no kernels for sm_70" in check.message
    assert "'torch<=2.14' --index-url https://download.pytorch.org/whl/cu126" in check.remedy
    blackwell_check = gpus.check_kernels_for(TorchBuild("2.10", "12.6", CU126), [Gpu("B200", 100, 180, 180)])
    assert blackwell_check.severity is Severity.error
    assert "cu126" not in blackwell_check.remedy


def test_missing_features_of_v100_and_features_of_ampere_are_named() -> None:
    volta_check = gpus.check_ability([H200, V100])
    assert volta_check.severity is Severity.warning
    assert volta_check.message == "sm_70: no bf16, no FlashAttention-2; packed attention runs on efficient"
    assert "fp16" in volta_check.remedy
    ampere_check = gpus.check_ability([A100])
    assert ampere_check.severity is Severity.ok
    assert "bf16 and FlashAttention-2" in ampere_check.message


def test_too_many_ranks_mixed_models_and_used_memory_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert gpus.check_gpus([H200] * 8, 8).severity is Severity.ok
    assert gpus.check_gpus([H200] * 8, 8).message == "8 x H200, 139 GiB, 138 GiB free"
    too_many_ranks = gpus.check_gpus([H200], 2)
    assert too_many_ranks.severity is Severity.error
    assert too_many_ranks.remedy == "start 1 ranks on this host"
    assert gpus.check_gpus([H200, A100], 2).severity is Severity.warning
    used_memory = gpus.check_gpus([A100, Gpu("A100", 80, 80, 40)], 2)
    assert used_memory.severity is Severity.warning
    assert "memory of GPU 1" in used_memory.message


def test_tasks_that_see_one_gpu_each_are_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"):
        monkeypatch.delenv(variable, raising=False)
    one = [gpus.Gpu("A100", 80, 80, 79)]
    assert gpus.check_gpus(one, 8).severity is Severity.ok
    assert gpus.check_gpus(one, 8).message.endswith("one visible to each of 8 ranks")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    assert gpus.check_gpus(one, 8).severity is Severity.error


def test_a_gpu_that_torch_does_not_see_is_explained() -> None:
    cpu, cuda = TorchBuild("2.13.0+cpu", "", ()), TorchBuild("2.13.0", "13.0", CU130)
    assert gpus.check_none(cpu, False, None, "").severity is Severity.ok
    assert "CPU build" in gpus.check_none(cpu, True, None, "").message
    assert gpus.check_none(cpu, True, None, "").severity is Severity.error
    assert gpus.check_none(cuda, True, "", "").severity is Severity.warning
    old_driver = gpus.check_none(cuda, True, None, "The NVIDIA driver on your system is too old")
    assert old_driver.severity is Severity.error
    assert "too old" in old_driver.message
    assert "CUDA 13.0" in old_driver.remedy


def test_gpus_of_the_hosts_are_compared() -> None:
    hosts = ["n1", "n1", "n2"]
    equal = gpus.check_same([["H200"] * 2, ["H200"] * 2, ["H200"] * 2], hosts)
    assert (equal.severity, equal.message) == (Severity.ok, "H200 on all 2 hosts")
    missing = gpus.check_same([["H200"], ["H200"], []], hosts)
    assert (missing.severity, missing.message) == (Severity.error, "none for rank 2 on n2, but other ranks have GPUs")
    mixed = gpus.check_same([["H200"], ["H200"], ["V100"]], hosts)
    assert (mixed.severity, mixed.message) == (Severity.warning, "H200 on n1, V100 on n2")
    assert mixed.remedy.startswith("set hardware.precision explicitly")
    assert gpus.check_same([[], [], []], hosts).severity is Severity.ok


def test_a_device_file_other_than_the_first_counts_as_a_card(tmp_path) -> None:
    for name in ("nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert not gpus.has_card(tmp_path)
    (tmp_path / "nvidia3").touch()
    assert gpus.has_card(tmp_path)


@pytest.mark.parametrize(
    ("files", "cuda", "severity"),
    [
        (["libbitsandbytes_cpu.so", "libbitsandbytes_cuda126.so"], "12.6", Severity.ok),
        (["libbitsandbytes_cpu.so", "libbitsandbytes_cuda128.so"], "12.9", Severity.warning),
        (["libbitsandbytes_cpu.so", "libbitsandbytes_cuda126.so"], "13.0", Severity.error),
        (["libbitsandbytes_cpu.so"], "12.6", Severity.error),
    ],
)
def test_bitsandbytes_needs_its_library_for_the_cuda_of_torch(files, cuda: str, severity: Severity) -> None:
    assert gpus.check_bitsandbytes(files, cuda).severity is severity


@pytest.mark.parametrize(
    ("ninja", "compiler", "severity"),
    [(True, True, Severity.ok), (False, True, Severity.warning), (True, False, Severity.warning)],
)
def test_cpu_adam_needs_ninja_and_a_compiler_alone(ninja, compiler, severity) -> None:
    assert gpus.check_build_tools(ninja, compiler, None).severity is severity


def test_what_triton_lacks_is_named() -> None:
    check = gpus.check_build_tools(True, True, "Triton needs gcc, clang or CC")
    assert check.severity is Severity.warning
    assert check.message == "Triton needs gcc, clang or CC"
