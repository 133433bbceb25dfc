"""Kernel selection by capability, number format and options; forced choices are obeyed or refused."""

import re
import sys

import fireflyds_kernels
import pytest
import torch
from fireflyds_kernels import CannotRunError, dispatch, force, requirements, swiglu
from fireflyds_kernels.dispatch import DispatchKey

PACKAGES = {"triton", "flash_attn", "flash_attn_interface", "bitsandbytes"}


def _choose(monkeypatch, kernel: str, key: DispatchKey, packages=frozenset({"triton", "bitsandbytes"})) -> str:
    monkeypatch.setattr(requirements, "triton_build_problem", lambda: None)
    monkeypatch.setattr(
        requirements,
        "import_problem",
        lambda package, name: None if package in packages else f"the package {package} is not installed",
    )
    return dispatch._KERNELS[kernel].choose(key)


@pytest.mark.parametrize(
    ("capability", "dtype", "extras", "packages", "expected"),
    [
        (90, torch.bfloat16, {}, PACKAGES, "flash_attn_3"),
        (90, torch.bfloat16, {"alibi": True}, PACKAGES, "flash_attn"),
        (80, torch.float16, {"window": True}, PACKAGES, "flash_attn"),
        (120, torch.bfloat16, {}, PACKAGES, "flash_attn"),
        (90, torch.bfloat16, {}, {"triton"}, "torch_varlen"),
        (80, torch.bfloat16, {"window": True}, {"triton"}, "torch_varlen"),
        (80, torch.bfloat16, {"alibi": True}, {"triton"}, "triton"),
        (80, torch.bfloat16, {"head_dim": 20}, {"triton"}, "triton"),
        (80, torch.float32, {}, {"triton"}, "triton"),
        (80, torch.float32, {}, set(), "efficient"),
        (80, torch.bfloat16, {"alibi": True}, set(), "bucketed"),
        (70, torch.float16, {}, PACKAGES, "efficient"),
        (75, torch.float16, {}, PACKAGES, "efficient"),
        (70, torch.float16, {"alibi": True}, PACKAGES, "bucketed"),
        (70, torch.float16, {"window": True}, PACKAGES, "bucketed"),
        (70, torch.float16, {"head_dim": 20}, PACKAGES, "bucketed"),
        (70, torch.bfloat16, {}, PACKAGES, "bucketed"),
        (70, torch.float32, {}, PACKAGES, "efficient"),
        (90, torch.bfloat16, {"head_dim": 512}, PACKAGES, "efficient"),
        (90, torch.bfloat16, {"head_dim": 20}, PACKAGES, "flash_attn"),
        (89, torch.float32, {"head_dim": 256}, PACKAGES, "efficient"),
    ],
)
def test_attention_implementation_by_gpu_generation(monkeypatch, capability, dtype, extras, packages, expected) -> None:
    key = DispatchKey("cuda", capability, dtype, **({"head_dim": 128} | extras))
    assert _choose(monkeypatch, "packed_attention", key, packages) == expected


def test_the_cpu_uses_the_reference(monkeypatch) -> None:
    key = DispatchKey("cpu", 0, torch.float32, 128)
    assert _choose(monkeypatch, "packed_attention", key, PACKAGES) == "reference"
    assert _choose(monkeypatch, "linear_cross_entropy", key) == "chunked"
    assert _choose(monkeypatch, "rms_norm", key) == "reference"


@pytest.mark.parametrize("kernel", ["rms_norm", "rope", "swiglu", "linear_cross_entropy"])
def test_elementwise_triton_runs_on_a_v100(monkeypatch, kernel) -> None:
    assert _choose(monkeypatch, kernel, DispatchKey("cuda", 70, torch.float16)) == "triton"
    assert _choose(monkeypatch, kernel, DispatchKey("cuda", 70, torch.float16), frozenset()) != "triton"


@pytest.mark.parametrize("kernel", ["rms_norm", "rope", "swiglu", "linear_cross_entropy"])
@pytest.mark.parametrize("capability", [60, 70, 75])
def test_bfloat16_through_triton_is_refused_below_sm_80(monkeypatch, kernel, capability) -> None:
    key = DispatchKey("cuda", capability, torch.bfloat16)
    assert _choose(monkeypatch, kernel, key) != "triton"
    assert dispatch.refusals(kernel, key)["triton"] == "bfloat16 needs sm_80 or newer"
    assert _choose(monkeypatch, kernel, DispatchKey("cuda", 80, torch.bfloat16)) == "triton"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("raise ImportError('undefined symbol: _ZN3c104cuda')", "cannot be imported (undefined symbol: _ZN3c104cuda)"),
        ("import no_such_library", "cannot be imported (No module named 'no_such_library')"),
        ("", "has no flash_attn_varlen_func"),
        (None, "is not installed"),
        ("def flash_attn_varlen_func(): ...", None),
    ],
)
def test_a_package_that_is_found_and_cannot_be_used_is_refused(monkeypatch, tmp_path, source, reason) -> None:
    if source is not None:
        (tmp_path / "flash_attn.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "flash_attn", raising=False)
    requirements.import_problem.cache_clear()
    try:
        refusals = dispatch.refusals("packed_attention", DispatchKey("cuda", 80, torch.bfloat16, 128))
    finally:
        requirements.import_problem.cache_clear()
        sys.modules.pop("flash_attn", None)
    assert refusals["flash_attn"] == (reason and f"the package flash_attn {reason}")


def test_a_triton_matrix_product_is_refused_below_sm_80(monkeypatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "packed_attention=triton")
    with pytest.raises(CannotRunError, match="needs sm_80"):
        _choose(monkeypatch, "packed_attention", DispatchKey("cuda", 75, torch.float16, 128))


def test_the_environment_and_the_context_manager_force_an_implementation(monkeypatch) -> None:
    key = DispatchKey("cpu", 0, torch.float32)
    monkeypatch.setattr(requirements, "import_problem", lambda package, name: None)
    monkeypatch.setenv(dispatch.VARIABLE, "linear_cross_entropy=reference")
    assert dispatch._KERNELS["linear_cross_entropy"].choose(key) == "reference"
    assert dispatch._KERNELS["qlora_linear"].choose(key) == "fused"
    with force("chunked"):
        assert dispatch._KERNELS["linear_cross_entropy"].choose(key) == "chunked"
        with force(linear_cross_entropy="reference", rope="reference"):
            assert dispatch._KERNELS["linear_cross_entropy"].choose(key) == "reference"
        assert dispatch._KERNELS["linear_cross_entropy"].choose(key) == "chunked"
    monkeypatch.setenv(dispatch.VARIABLE, "reference")
    assert dispatch._KERNELS["qlora_linear"].choose(key) == "reference"


def test_unknown_names_list_the_known(monkeypatch) -> None:
    with (
        pytest.raises(CannotRunError, match="no kernel is called 'attention'. Known: .*packed_attention"),
        force(attention="triton"),
    ):
        pass
    with pytest.raises(CannotRunError, match="'cuda'. Known: .*bucketed.*triton"), force("cuda"):
        pass
    monkeypatch.setenv(dispatch.VARIABLE, "swiglu=efficient")
    with pytest.raises(
        CannotRunError, match="implementation of swiglu is called 'efficient'. Known: reference, triton"
    ):
        swiglu(torch.zeros(3), torch.zeros(3))


def test_the_description_names_every_kernel_and_reason() -> None:
    text = fireflyds_kernels.describe()
    for kernel in dispatch._KERNELS:
        assert len(re.findall(rf"^  {kernel} ", text, re.MULTILINE)) == 3 * (torch.cuda.device_count() + 1)
    if not torch.cuda.is_available():
        assert re.search(
            (
                r"packed_attention +float32 +reference +flash_attn_3 needs an NVIDIA GPU; .*triton runs here only "
                r"when named"
            ),
            text,
        )


def test_the_description_names_forced_and_impossible_implementations(monkeypatch) -> None:
    monkeypatch.setenv(dispatch.VARIABLE, "packed_attention=efficient,swiglu=reference")
    text = fireflyds_kernels.describe()
    assert re.search(r"swiglu +float16 +reference +forced", text)
    assert re.search(r"packed_attention +float16 +none +packed_attention was forced to run 'efficient' on cpu", text)


def test_forces_nest() -> None:
    kernel, key = dispatch._KERNELS["linear_cross_entropy"], DispatchKey("cpu", 0, torch.float32)
    with force("reference"), force("chunked"):
        with force("reference"):
            assert kernel.choose(key) == "reference"
        assert kernel.choose(key) == "chunked"


@pytest.mark.parametrize(
    ("compiler", "header", "reason"),
    [
        ("cc", True, None),
        ("no-such-compiler", True, "Triton needs a C compiler (CC=no-such-compiler is none)"),
        (None, True, "Triton needs gcc, clang or CC"),
        ("cc", False, "Triton needs Python.h in {folder} (python3-dev)"),
    ],
)
def test_triton_is_refused_where_it_cannot_build(monkeypatch, tmp_path, compiler, header, reason) -> None:
    (tmp_path / "cc").touch(mode=0o755)
    if header:
        (tmp_path / "Python.h").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CC", compiler) if compiler else monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(requirements.sysconfig, "get_paths", lambda scheme: {"include": str(tmp_path)})
    monkeypatch.setattr(requirements, "import_problem", lambda package, name: None)
    requirements.triton_build_problem.cache_clear()
    try:
        refusal = dispatch.refusals("rms_norm", DispatchKey("cuda", 90, torch.bfloat16))["triton"]
    finally:
        requirements.triton_build_problem.cache_clear()
    assert refusal == (reason and reason.format(folder=tmp_path))
