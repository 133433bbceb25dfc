"""What trains, and that merged weights compute what the adapted model does."""

from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fireflyds import registry
from fireflyds.config import ModelConfig, ModelInit, Precision, TuningConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.models import load, tuning

LLAMA = registry.find("fireflyds.models.families", "llama").FAMILY


@pytest.fixture
def base(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        tie_word_embeddings=False,
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    return tmp_path / "base"


def _load(base: Path, config: TuningConfig):
    model_config = ModelConfig(init=ModelInit.pretrained, path=str(base))
    hf_config = AutoConfig.from_pretrained(base)
    quantization = tuning.quantization(config, Precision.fp32)
    loaded = load.load_model(model_config, hf_config, Precision.fp32, 0, quantization)
    return tuning.apply(loaded.model, loaded.family, config, seed=0)


def _train_a_little(model) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(3):
        model(ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("targets", [[], ["q_proj", "v_proj"]])
@pytest.mark.parametrize("train_embeddings", [False, True])
@pytest.mark.parametrize("method", [TuningMethod.lora, TuningMethod.qlora])
def test_merged_equals_attached(base: Path, method: TuningMethod, train_embeddings: bool, targets: list[str]) -> None:
    model = _load(
        base, TuningConfig(method=method, r=4, dropout=0.0, train_embeddings=train_embeddings, target_modules=targets)
    )
    before = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    _train_a_little(model)
    for name, parameter in model.named_parameters():
        assert name not in before or torch.equal(parameter, before[name]), f"{name} is frozen and changed"
    ids = torch.randint(0, 60, (1, 11))
    attached = model(ids).logits
    plain = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    plain.load_state_dict(tuning.merged_state_dict(model), strict=True)
    difference = (plain(ids).logits - attached).abs().max() / attached.abs().max()
    assert difference <= 1e-5
    untouched = AutoModelForCausalLM.from_pretrained(base)
    assert (untouched(ids).logits - attached).abs().max() > 1e-3


def test_counts_and_trainable_parameters(base: Path) -> None:
    config = TuningConfig(method=TuningMethod.qlora, r=4, train_embeddings=True)
    model = _load(base, config)
    total, trainable = tuning.count_parameters(model)
    adapters = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
    assert trainable == adapters + 2 * 60 * 64
    plain = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert total == plain + adapters
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)


def test_restoring_weights_that_do_not_belong_is_refused(base: Path) -> None:
    model = _load(base, TuningConfig(method=TuningMethod.lora, r=4))
    weights = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    name = next(iter(weights))
    with pytest.raises(UserError, match=r"lacks 1 trained tensors"):
        tuning.restore(model, {key: value for key, value in weights.items() if key != name}, Path("step-1"))
    with pytest.raises(UserError, match="Its base changed since"):
        tuning.restore(model, weights | {name: torch.zeros(1, 1)}, Path("step-1"))
    tuning.restore(model, {key: value + 1 for key, value in weights.items()}, Path("step-1"))
    assert torch.equal(dict(model.named_parameters())[name], weights[name] + 1)


def test_unknown_family_and_wrong_tokenizer_are_refused(base: Path, encoder) -> None:
    with pytest.raises(UserError, match="families: no entry 'gptx'. Known: bloom, falcon, llama"):
        load.family_of("gptx")
    with pytest.raises(UserError, match=r"the embeddings have 60 rows but the tokenizer .* has 400 pieces"):
        load.read_config(ModelConfig(init=ModelInit.pretrained, path=str(base)), encoder)
