"""What is said of GPUs, from their capability, this torch's kernels and the tools around."""

import pytest

from fireflyds.engine.doctor import gpus
from fireflyds.engine.doctor.check import Verdict
from fireflyds.engine.doctor.gpus import Gpu, TorchBuild

CU126 = ("sm_50", "sm_60", "sm_70", "sm_75", "sm_80", "sm_86", "sm_90")
CU130 = ("sm_75", "sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "compute_120")
V100, A100, H200 = (Gpu(n, c, m, m - 0.5) for n, c, m in (("V100", 70, 32), ("A100", 80, 80), ("H200", 90, 139)))


@pytest.mark.parametrize(
    ("capability", "archs", "able"),
    [
        (70, CU126, True),
        (70, CU130, False),
        (89, CU130, True),  # sm_86 serves 8.9
        (80, ("sm_86",), False),
        (103, CU130, True),
        (103, ("sm_100a",), False),
        (90, ("sm_90a",), True),
        (130, CU130, True),  # from PTX
        (121, ("sm_90",), False),
    ],
)
def test_kernels_serve_their_major_version_and_ptx_all_newer(capability: int, archs, able: bool) -> None:
    assert gpus.has_kernels(capability, archs) is able


def test_a_torch_without_volta_is_red_on_v100_and_says_which_wheel_has_it() -> None:
    assert gpus.check_kernels_for(TorchBuild("2.14.0", "12.6", CU126), [V100]).verdict is Verdict.green
    check = gpus.check_kernels_for(TorchBuild("2.15.0", "13.0", CU130), [V100, H200])
    assert check.verdict is Verdict.red
    assert "none for sm_70" in check.found
    assert "'torch<=2.14' --index-url https://download.pytorch.org/whl/cu126" in check.remedy
    newer = gpus.check_kernels_for(TorchBuild("2.10", "12.6", CU126), [Gpu("B200", 100, 180, 180)])
    assert newer.verdict is Verdict.red
    assert "cu126" not in newer.remedy


def test_v100_is_told_what_it_lacks_and_ampere_what_it_has() -> None:
    old = gpus.check_ability([H200, V100])
    assert old.verdict is Verdict.yellow
    assert old.found == "sm_70: no bf16, no FlashAttention-2; packed attention runs on efficient"
    assert "fp16" in old.remedy
    new = gpus.check_ability([A100])
    assert new.verdict is Verdict.green
    assert "bf16 and FlashAttention-2" in new.found


def test_too_many_ranks_mixed_kinds_and_taken_memory_are_noticed() -> None:
    assert gpus.check_gpus([H200] * 8, 8).verdict is Verdict.green
    assert gpus.check_gpus([H200] * 8, 8).found == "8 x H200, 139 GiB, 138 GiB free"
    crowded = gpus.check_gpus([H200], 2)
    assert crowded.verdict is Verdict.red
    assert crowded.remedy == "start 1 ranks on this host"
    assert gpus.check_gpus([H200, A100], 2).verdict is Verdict.yellow
    taken = gpus.check_gpus([A100, Gpu("A100", 80, 80, 40)], 2)
    assert taken.verdict is Verdict.yellow
    assert "memory of GPU 1" in taken.found


def test_a_gpu_that_torch_does_not_see_is_explained() -> None:
    cpu, cuda = TorchBuild("2.13.0+cpu", "", ()), TorchBuild("2.13.0", "13.0", CU130)
    assert gpus.check_none(cpu, False, None, "").verdict is Verdict.green
    assert "CPU build" in gpus.check_none(cpu, True, None, "").found
    assert gpus.check_none(cpu, True, None, "").verdict is Verdict.red
    assert gpus.check_none(cuda, True, "", "").verdict is Verdict.yellow
    old_driver = gpus.check_none(cuda, True, None, "The NVIDIA driver on your system is too old")
    assert old_driver.verdict is Verdict.red
    assert "too old" in old_driver.found
    assert "CUDA 13.0" in old_driver.remedy


def test_gpus_of_the_hosts_are_compared() -> None:
    hosts = ["n1", "n1", "n2"]
    alike = gpus.check_same([["H200"] * 2, ["H200"] * 2, ["H200"] * 2], hosts)
    assert (alike.verdict, alike.found) == (Verdict.green, "H200 on all 2 hosts")
    gone = gpus.check_same([["H200"], ["H200"], []], hosts)
    assert (gone.verdict, gone.found) == (Verdict.red, "none for rank 2 on n2, others have them")
    mixed = gpus.check_same([["H200"], ["H200"], ["V100"]], hosts)
    assert (mixed.verdict, mixed.found) == (Verdict.yellow, "H200 on n1, V100 on n2")
    assert mixed.remedy.startswith("set hardware.precision yourself")
    assert gpus.check_same([[], [], []], hosts).verdict is Verdict.green


def test_a_container_may_have_another_card_than_the_first(tmp_path) -> None:
    for name in ("nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    assert not gpus.has_card(tmp_path)
    (tmp_path / "nvidia3").touch()
    assert gpus.has_card(tmp_path)


@pytest.mark.parametrize(
    ("files", "cuda", "verdict"),
    [
        (["libbitsandbytes_cpu.so", "libbitsandbytes_cuda126.so"], "12.6", Verdict.green),
        (["libbitsandbytes_cpu.so", "libbitsandbytes_cuda128.so"], "12.9", Verdict.yellow),
        (["libbitsandbytes_cpu.so", "libbitsandbytes_cuda126.so"], "13.0", Verdict.red),
        (["libbitsandbytes_cpu.so"], "12.6", Verdict.red),
    ],
)
def test_bitsandbytes_needs_its_library_for_this_cuda(files, cuda: str, verdict: Verdict) -> None:
    assert gpus.check_bitsandbytes(files, cuda).verdict is verdict


@pytest.mark.parametrize(
    ("cuda", "ninja", "compiler", "nvcc", "verdict"),
    [
        ("", True, True, None, Verdict.green),  # no GPU, no nvcc needed
        ("", False, True, None, Verdict.yellow),
        ("13.0", True, True, "13.0", Verdict.green),
        ("12.6", True, True, "12.9", Verdict.green),
        ("13.0", True, True, "12.9", Verdict.yellow),
        ("13.0", True, True, None, Verdict.yellow),
        ("13.0", True, False, "13.0", Verdict.yellow),
    ],
)
def test_cpu_adam_needs_ninja_a_compiler_and_a_fitting_nvcc(cuda, ninja, compiler, nvcc, verdict) -> None:
    assert gpus.check_build_tools(cuda, ninja, compiler, nvcc).verdict is verdict
