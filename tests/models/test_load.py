"""Loading a model directory for inference: on the first GPU, and only where it has the memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from fireflyds.errors import UserError
from fireflyds.models.load import load_for_inference
from fireflyds.testing.models import save_tiny_llama


class Loaded:
    """Stands for a model; `device_map` is what it was loaded with."""

    def __init__(self, *_: Any, device_map: Any = None, **__: Any) -> None:
        self.device_map = device_map

    def eval(self) -> "Loaded":
        return self


@pytest.fixture
def weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of the tiny model at `tmp_path / "m"`, on a machine that seems to have a GPU."""
    save_tiny_llama(tmp_path / "m")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", Loaded)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def test_a_model_that_fits_is_read_onto_the_first_gpu(tmp_path: Path, monkeypatch, weights: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (weights, 1 << 40))
    assert load_for_inference(tmp_path / "m").device_map == {"": 0}


def test_a_model_that_does_not_fit_is_refused_before_it_is_read(tmp_path: Path, monkeypatch, weights: int) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (weights - 1, 1 << 40))
    with pytest.raises(UserError, match="the first GPU has .* GiB free"):
        load_for_inference(tmp_path / "m")
    assert load_for_inference(tmp_path / "m", or_on_cpu=True).device_map is None
