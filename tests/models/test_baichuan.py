"""Baichuan in its makers' layout: the logits of a reference written from the equations; trained, and written back."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from original_llamas import LLAMAS
from safetensors.torch import load_file, save_file
from torch.nn.functional import normalize
from transformers import AutoModelForCausalLM

from fireflyds import app
from fireflyds.config import Precision
from fireflyds.errors import UserError
from fireflyds.export.merged_weights import merged_entries
from fireflyds.export.publish import trained_logits, write_weights
from fireflyds.models.load import bare_model, config_of
from fireflyds.models.packed.equivalence import compare_implementations
from fireflyds.models.packed.forward import fuse
from fireflyds.models.tuning import load_tuned_model
from fireflyds.types import PackedBatch

NAMES = ["baichuan_7b", "baichuan_13b", "baichuan2_7b", "baichuan2_13b"]
IDS = torch.randint(3, 131, (2, 40), generator=torch.Generator().manual_seed(1))


def save(name: str, folder: Path, **changes: Any) -> Path:
    config = LLAMAS[name].config() | {"normalized_head": "2" in name.split("_")[0], "torch_dtype": "float32"} | changes
    weights = LLAMAS[name].weights(config, torch.Generator().manual_seed(0))
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": {"AutoConfig": "configuration_baichuan.X"}}))
    (folder / "configuration_baichuan.py").write_text("raise SystemExit('never run')")
    save_file({key: tensor.clone() for key, tensor in weights.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def expected_logits(name: str, folder: Path, ids: torch.Tensor) -> torch.Tensor:
    config = json.loads((folder / "config.json").read_text())
    return LLAMAS[name].logits(config, load_file(folder / "model.safetensors"), ids)


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, config=config_of("model", str(folder))).eval()


@pytest.mark.parametrize("name", NAMES)
def test_logits_are_those_of_the_published_equations(name: str, tmp_path: Path) -> None:
    model, expected = load(save(name, tmp_path)), expected_logits(name, tmp_path, IDS)
    with torch.no_grad():
        logits = model(IDS).logits
    assert float((logits - expected).abs().max()) < 5e-6 * float(expected.abs().max())
    longer = IDS[:, :10]
    for _ in range(6):  # greedy decoding without a cache
        longer = torch.cat([longer, expected_logits(name, tmp_path, longer)[:, -1].argmax(-1)[:, None]], dim=1)
    generated = model.generate(IDS[:, :10], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)
    assert torch.equal(generated, longer)


@pytest.mark.parametrize("name", NAMES)
def test_packed_documents_train_as_single_ones(name: str, tmp_path: Path) -> None:
    results = list(compare_implementations(load(save(name, tmp_path)), [5, 1, 70, 33], seed=1))
    assert results
    assert all(result.proven for result in results), results


def test_a_normalised_head_is_normalised_at_every_step(tmp_path: Path) -> None:
    """Gradients of the fused loss reach the rows through their norms: a row's gradient is at right angles to it."""
    model = fuse(load(save("baichuan2_7b", tmp_path)))
    batch = PackedBatch.from_documents([IDS[0].tolist()]).model_inputs(torch.device("cpu"))
    loss = model(**batch)
    logits = expected_logits("baichuan2_7b", tmp_path, IDS[:1])[0, :-1]
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, IDS[0, 1:], reduction="sum"))
    loss.backward()
    weight, gradient = model.lm_head.weight.detach(), model.lm_head.weight.grad
    assert float(gradient.abs().max()) > 1e-3
    assert float((weight * gradient).sum(1).abs().max()) < 1e-4
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
        torch.testing.assert_close(model(**batch), loss.detach())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("method", ["freeze", "lora"])
def test_the_makers_layout_is_written_back(name: str, method: str, tmp_path: Path) -> None:
    """Bit for bit where nothing was trained; otherwise the reference gives the trained model's logits."""
    base, out = save(name, tmp_path / "base"), tmp_path / "out"
    keys = ["run=x", f"model={base}", "data=c/d", "optim.steps=3", f"tuning={method}"]
    keys += ["tuning.trainable=[model.norm]"] if method == "freeze" else ["tuning.dropout=0", "tuning.r=2"]
    model = load_tuned_model(app.compose("train", keys), hf_config := config_of("model", str(base)), Precision.fp32)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            parameter.data.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(2)), alpha=0.1)
    out.mkdir()
    copied = write_weights(out, hf_config, merged_entries(model, torch.float32), torch.float32, base)
    before, after = load_file(base / "model.safetensors"), load_file(out / "model.safetensors")
    kept = {key for key in before if "inv_freq" not in key}
    assert (copied, after.keys()) == (0, kept)
    assert (out / "configuration_baichuan.py").is_file()
    rounded = {"lm_head.weight"} if "2" in name.split("_")[0] else set()  # its rows have norm 1, see below
    if method == "freeze":
        assert all(torch.equal(before[key], after[key]) for key in kept - rounded)
    else:
        assert not torch.equal(
            before["model.layers.0.self_attn.W_pack.weight"], after["model.layers.0.self_attn.W_pack.weight"]
        )
        expected = expected_logits(name, out, IDS[:1])
        assert float((trained_logits(model, IDS[:1]) - expected).abs().max()) < 2e-5 * float(expected.abs().max())


@pytest.mark.parametrize(("rows", "is_written"), [(125_696, True), (125_704, False)])
def test_the_head_of_an_expanded_baichuan2_has_rows_of_norm_one(rows: int, is_written: bool, tmp_path: Path) -> None:
    """Other programs divide the rows only where there are 125,696: they would read the raw rows of an expanded head."""
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    base = save("baichuan2_7b", tmp_path / "base", vocab_size=rows, base_vocab_sizes=[125_696], **sizes)
    config = json.loads((base / "config.json").read_text())
    del config["normalized_head"]
    (base / "config.json").write_text(json.dumps(config))
    hf_config = config_of("model", str(base))
    assert hf_config.normalized_head
    model = load(base)
    (tmp_path / "out").mkdir()
    write_weights(tmp_path / "out", hf_config, merged_entries(model, torch.float32), torch.float32, base)
    before = load_file(base / "model.safetensors")["lm_head.weight"]
    after = load_file(tmp_path / "out/model.safetensors")["lm_head.weight"]
    assert torch.equal(after, before if is_written else normalize(before))


def test_a_head_of_unknown_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has 131 rows, neither the 64,000 of Baichuan nor the 125,696 of Baichuan 2"):
        bare_model(config_of("model", str(save("baichuan_7b", tmp_path, normalized_head=None))))
