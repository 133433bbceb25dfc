"""Number formats by hardware: a format that a GPU lacks is refused, one that a CPU lacks is emulated."""

from types import SimpleNamespace

import pytest
import torch
from emulation import without_half_precision

from fireflyds.config import HardwareConfig, Precision
from fireflyds.errors import UserError
from fireflyds.models.precision import emulation_notes, has_bf16, inference_dtype, is_emulated, resolve_precision

HALF = (Precision.bf16, Precision.fp16)


def test_a_cpu_trains_in_fp32_unless_another_format_is_configured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with without_half_precision():
        assert resolve_precision(HardwareConfig(precision=Precision.auto)) is Precision.fp32
        for precision in HALF:
            assert resolve_precision(HardwareConfig(precision=precision)) is precision


@pytest.mark.parametrize("precision", HALF)
def test_an_emulated_format_gives_a_note_with_its_slowdown(precision: Precision) -> None:
    with without_half_precision():
        (note,) = emulation_notes(precision)
        assert emulation_notes(Precision.fp32) == []
    assert note.startswith(f"note: hardware.precision={precision.name}: this CPU has no {precision.name} arithmetic")
    assert " times as long as in fp32" in note


def test_inference_uses_float32_where_the_saved_format_is_emulated() -> None:
    saved_in_bf16, saved_in_fp32 = SimpleNamespace(dtype=torch.bfloat16), SimpleNamespace(dtype=None)
    with without_half_precision():
        assert is_emulated(torch.bfloat16)
        assert not is_emulated(torch.float32)
        assert inference_dtype(saved_in_bf16) is torch.float32
        assert inference_dtype(saved_in_fp32) == "auto"


def test_a_bf16_checkpoint_is_loaded_in_float16_on_a_gpu_without_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    found = {}
    for capability in ((7, 0), (7, 5), (8, 0), (9, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda capability=capability: capability)
        found[capability] = [inference_dtype(SimpleNamespace(dtype=dtype)) for dtype in (torch.bfloat16, torch.float16)]
    old, new = [torch.float16, "auto"], ["auto", "auto"]
    assert found == {(7, 0): old, (7, 5): old, (8, 0): new, (9, 0): new}


def test_formats_a_gpu_lacks_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla V100")
    assert resolve_precision(HardwareConfig(precision=Precision.auto)) is Precision.fp16
    with pytest.raises(UserError, match="Tesla V100 has no bf16. Use hardware.precision=fp16"):
        resolve_precision(HardwareConfig(precision=Precision.bf16))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    assert resolve_precision(HardwareConfig(precision=Precision.auto)) is Precision.bf16
    assert not is_emulated(torch.bfloat16)
    assert [has_bf16(capability) for capability in (70, 75, 80, 90)] == [False, False, True, True]
