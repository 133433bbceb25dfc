"""Loading a model directory: what is no model is named, and inference takes the first GPU where it has the memory."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fireflyds.config import ModelConfig
from fireflyds.errors import UserError
from fireflyds.models.load import architecture_of, load_for_inference
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


@pytest.mark.parametrize(
    ("settings", "method"),
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "fp8", "weight_block_size": [128, 128]}, "fp8"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
    ],
)
def test_a_quantised_base_is_refused_by_its_method(tmp_path: Path, settings: dict, method: str) -> None:
    config = AutoConfig.for_model("llama")
    config.quantization_config = settings
    config.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=rf"weights are quantised \({method}\)"):
        architecture_of(ModelConfig(path=str(tmp_path)))


def test_what_lies_in_the_place_of_a_model_is_named(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(UserError, match="it holds adapters of org/base, not a model. Merge them"):
        architecture_of(ModelConfig(path=str(tmp_path)))
    gguf = tmp_path / "model.gguf"
    gguf.touch()
    with pytest.raises(UserError, match="it holds GGUF"):
        architecture_of(ModelConfig(path=str(gguf)))
