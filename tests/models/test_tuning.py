"""Trained parameters of every tuning method; merged, saved and restored weights compute what the tuned model does."""

from functools import partial
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM

from fireflyds import app, registry
from fireflyds.checkpoint import trainable_files, trainable_weights
from fireflyds.config import ModelConfig, ModelInit, Precision, TrainableRows, TuningConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.export.merged_weights import merged_entries
from fireflyds.models import load, tuning
from fireflyds.models.tuning import reset_dora_magnitudes
from fireflyds.testing.models import save_tiny_llama

LLAMA = registry.load("fireflyds.models.families", "llama").FAMILY
FROZEN = {"embeddings": TrainableRows.frozen, "head": TrainableRows.frozen}
ALL_ROWS = {"embeddings": TrainableRows.all, "head": TrainableRows.all}
NEW_ROWS = {"embeddings": TrainableRows.new_rows, "head": TrainableRows.new_rows}
LORA = {"method": TuningMethod.lora, "r": 4, "dropout": 0.0}


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_tiny_llama(tmp_path / "base")


def tuned_model(base: Path, config: TuningConfig, *, zero_stage: int = 2, precision: Precision = Precision.fp32):
    quantization = tuning.quantization_config(config, precision, zero_stage)
    hf_config = AutoConfig.from_pretrained(base)
    model_config = ModelConfig(init=ModelInit.pretrained, path=str(base))
    loaded = load.load_model(model_config, hf_config, precision, 0, quantization)
    return tuning.apply_tuning(
        loaded.model, loaded.family, config, load.base_vocab_size(model_config, hf_config), seed=0
    )


def train_steps(model, steps: int = 3) -> None:
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    ids = torch.randint(0, 60, (2, 9), generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        logits = model(ids).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()


def merged_model(base: Path, model):
    untuned_model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base))
    untuned_model.load_state_dict(merged_state_dict(model), strict=True)
    return untuned_model


def merged_state_dict(model) -> dict[str, torch.Tensor]:
    return {name: entry.make() for name, entry in merged_entries(model).items()}


METHODS = {
    "lora": LORA,
    "rslora": LORA | {"use_rslora": True},
    "dora": LORA | {"use_dora": True},
    "qlora": LORA | {"method": TuningMethod.qlora},
    "qdora": LORA | {"method": TuningMethod.qlora, "use_dora": True},
    "qlora 8 bit": LORA | {"method": TuningMethod.qlora, "bits": 8},
    "freeze": {"method": TuningMethod.freeze, "trainable": ["layers.1.*norm"]},
    "full": {"method": TuningMethod.full},
}


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("rows", [FROZEN, ALL_ROWS, NEW_ROWS], ids=["frozen", "all", "new_rows"])
@pytest.mark.parametrize("method", METHODS)
def test_merged_weights_equal_attached_adapters_and_frozen_weights_do_not_change(
    tmp_path: Path, method: str, rows: dict, tied: bool
) -> None:
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=tied, base_vocab_size=40)
    model = tuned_model(base, TuningConfig(**METHODS[method], **rows))
    frozen_parameters = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    train_steps(model)
    for name, parameter in model.named_parameters():
        assert name not in frozen_parameters or torch.equal(parameter, frozen_parameters[name]), (
            f"{name} is frozen and changed"
        )
    ids = torch.randint(0, 60, (1, 11))
    tuned_logits = model(ids).logits
    merged_logits = merged_model(base, model)(ids).logits
    assert (merged_logits - tuned_logits).abs().max() / tuned_logits.abs().max() <= 1e-5
    base_model = AutoModelForCausalLM.from_pretrained(base)
    assert (base_model(ids).logits - tuned_logits).abs().max() > 1e-3
    if rows is NEW_ROWS:
        merged_weights = merged_state_dict(model)
        for key in ("model.embed_tokens.weight", "lm_head.weight"):
            assert torch.equal(merged_weights[key][:40], base_model.state_dict()[key][:40])
            assert (merged_weights[key][40:] != base_model.state_dict()[key][40:]).any()


@pytest.mark.parametrize("tied", [False, True])
def test_training_only_new_rows_equals_masked_training_of_all_rows(tmp_path: Path, tied: bool) -> None:
    """50 steps against training whole matrices with the old rows' gradient put to zero."""
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=tied, base_vocab_size=40)
    results = []
    for rows in (NEW_ROWS, ALL_ROWS):
        model = tuned_model(base, TuningConfig(**METHODS["lora"], **rows)).train()
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0)
        losses = []
        for step in range(50):
            ids = torch.randint(0, 60, (2, 24), generator=torch.Generator().manual_seed(step % 5))
            loss = torch.nn.functional.cross_entropy(model(ids).logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            if rows is ALL_ROWS:
                for matrix in (model.get_input_embeddings().weight, model.get_output_embeddings().weight):
                    matrix.grad[:40] = 0
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        states = sum(t.numel() * t.element_size() for s in optimizer.state.values() for t in s.values() if t.dim())
        results.append((losses, merged_state_dict(model), states))
    (losses, weights, states), (expected_losses, expected_weights, expected_states) = results
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(expected_losses), rtol=2e-5, atol=1e-5)
    assert losses[-1] < losses[0] - 0.1
    old_rows = AutoModelForCausalLM.from_pretrained(base).state_dict()["model.embed_tokens.weight"][:40]
    assert torch.equal(weights["model.embed_tokens.weight"][:40], old_rows)
    torch.testing.assert_close(weights["lm_head.weight"], expected_weights["lm_head.weight"], rtol=1e-3, atol=1e-4)
    # Two moments of float32 for each row that does not train.
    assert expected_states - states == (1 if tied else 2) * 40 * 64 * 2 * 4


def test_counts_and_trained_tensors_in_float32(base: Path) -> None:
    from fireflyds.optim.param_groups import count_parameters

    model = tuned_model(base, TuningConfig(**METHODS["qlora"], **ALL_ROWS))
    total, trainable = count_parameters(model)
    adapters = 2 * 4 * (4 * (64 + 64) + 3 * (64 + 128))
    assert trainable == adapters + 2 * 60 * 64
    num_base_parameters = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert total == num_base_parameters + adapters
    assert all(p.dtype is torch.float32 for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize(
    ("targets", "adapted"),
    [(["q_proj", "v_proj"], 4), ([r"model\.layers\.1\..*proj"], 7), (["o_proj", r".*layers\.0\.mlp\..*"], 5)],
)
def test_target_modules_are_names_or_regular_expressions(base: Path, targets: list[str], adapted: int) -> None:
    model = tuned_model(base, TuningConfig(**LORA, **FROZEN, target_modules=targets))
    assert sum("lora_A" in name for name, _ in model.named_parameters()) == adapted


def test_settings_that_match_nothing_are_refused(base: Path) -> None:
    for config, message in (
        (
            TuningConfig(**LORA, **FROZEN, target_modules=["qproj"]),
            r"'qproj' matches no linear layer. Known: down_proj, ",
        ),
        (TuningConfig(**LORA, **FROZEN, target_modules=["lm_head"]), "'lm_head' matches no linear layer"),
        (TuningConfig(**LORA, **FROZEN, target_modules=["(q"]), "not a valid regular expression"),
        (TuningConfig(method=TuningMethod.freeze, trainable=["nrom"], **FROZEN), "'nrom' matches no parameter"),
        (TuningConfig(method=TuningMethod.freeze, **FROZEN), "no parameter is trainable"),
        (TuningConfig(**LORA, **NEW_ROWS), "config.json has no base_vocab_size"),
    ):
        with pytest.raises(UserError, match=message):
            tuned_model(base, config)
    with pytest.raises(UserError, match=r"tuning.trainable=\['norm'\]: only tuning=freeze reads it, this is lora"):
        TuningConfig(**LORA, **FROZEN, trainable=["norm"])


def test_a_tied_head_must_have_the_setting_of_the_embeddings(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=True, base_vocab_size=40)
    with pytest.raises(UserError, match="so both must have the same value"):
        tuned_model(base, TuningConfig(**LORA, embeddings=TrainableRows.all, head=TrainableRows.frozen))
    model_config = ModelConfig(init=ModelInit.pretrained, path=str(base), base_vocab_size=50)
    with pytest.raises(UserError, match=r"model.base_vocab_size=50: the model's config.json has 40"):
        load.base_vocab_size(model_config, AutoConfig.from_pretrained(base))


def _save_trainable_weights(model, folder: Path, metadata: dict | None = None) -> trainable_weights.TrainableWeights:
    weights = _collect_trainable_weights(model, metadata or {"base": "b"})
    trainable_files.save_trainable_weights(weights, folder)
    _verify(folder, trainable_weights.trainable_shapes(model), updated=True)
    return weights


def _collect_trainable_weights(model, metadata: dict) -> trainable_weights.TrainableWeights:
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    description = trainable_weights.describe_trainable_weights(model, tuning.adapter_config_of(model), metadata)
    return trainable_weights.with_tensors(description, {name: partial(parameters.get, name) for name in parameters})


def _verify(folder: Path, shapes: dict, *, updated: bool) -> None:
    stored = trainable_files.load_trainable_weights(folder)
    trainable_files.verify_saved_weights(folder, stored.items(), shapes, updated=updated)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "qlora", "freeze"])
def test_saved_trainable_weights_restore_the_model(tmp_path: Path, method: str) -> None:
    base = save_tiny_llama(tmp_path / "base", base_vocab_size=40)
    config = TuningConfig(**METHODS[method], **NEW_ROWS)
    model = tuned_model(base, config)
    train_steps(model)
    _save_trainable_weights(model, tmp_path / "learnt")
    restored = tuned_model(base, config)
    trainable_weights.load_into_model(
        restored, trainable_files.load_trainable_weights(tmp_path / "learnt"), "here", must_cover=True
    )
    ids = torch.randint(0, 60, (1, 11))
    assert torch.equal(restored(ids).logits, model(ids).logits)
    # New rows can be loaded into a model that trains all rows, or none.
    if method != "qlora":
        for rows in (ALL_ROWS, FROZEN):
            other = tuned_model(base, TuningConfig(**METHODS[method], **rows))
            trainable_weights.load_into_model(
                other, trainable_files.load_trainable_weights(tmp_path / "learnt"), "here", must_cover=False
            )
            assert torch.equal(other(ids).logits, model(ids).logits)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_peft_reads_the_adapters(base: Path, tmp_path: Path, method: str) -> None:
    model = tuned_model(base, TuningConfig(**METHODS[method], **FROZEN))
    train_steps(model)
    _save_trainable_weights(model, tmp_path / "learnt")
    peft_model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), tmp_path / "learnt").eval()
    ids = torch.randint(0, 60, (1, 11))
    torch.testing.assert_close(peft_model(ids).logits, model.eval()(ids).logits, rtol=1e-6, atol=1e-6)


def test_an_incomplete_save_is_refused(base: Path, tmp_path: Path) -> None:
    model = tuned_model(base, TuningConfig(**METHODS["lora"], **ALL_ROWS))
    shapes = trainable_weights.trainable_shapes(model)
    untrained = _collect_untrained_weights(model)
    trainable_files.save_trainable_weights(untrained, tmp_path / "a")
    _verify(tmp_path / "a", shapes, updated=False)
    with pytest.raises(UserError, match="saved as zeros only, so training did not reach it"):
        _verify(tmp_path / "a", shapes, updated=True)
    trainable_files.save_trainable_weights(trainable_weights.TrainableWeights(untrained.adapters), tmp_path / "b")
    with pytest.raises(UserError, match=r"2 of 30 trained tensors were not saved whole.*missing"):
        _verify(tmp_path / "b", shapes, updated=False)
    untrained.weights = {**untrained.weights, "lm_head.weight": torch.zeros(60, 64)}
    trainable_files.save_trainable_weights(untrained, tmp_path / "c")
    with pytest.raises(UserError, match=r"lm_head.weight was saved as zeros only"):
        _verify(tmp_path / "c", shapes, updated=False)
    # What an unsharded save under ZeRO-3 would hold.
    untrained.weights = {**untrained.weights, "lm_head.weight": torch.ones(0, 64)}
    trainable_files.save_trainable_weights(untrained, tmp_path / "d")
    with pytest.raises(UserError, match=r"1 of 30 trained tensors .*\(0, 64\), trained \(60, 64\)"):
        _verify(tmp_path / "d", shapes, updated=False)


def test_restoring_mismatched_weights_is_refused(base: Path, tmp_path: Path) -> None:
    model = tuned_model(base, TuningConfig(**METHODS["lora"], **ALL_ROWS))
    weights = _collect_untrained_weights(model)
    name = next(iter(weights.adapters))
    incomplete = trainable_weights.TrainableWeights(
        {key: value for key, value in weights.adapters.items() if key != name}, weights.weights
    )
    with pytest.raises(UserError, match=r"lacks 1 trained tensors"):
        trainable_weights.load_into_model(model, incomplete, "step-1", must_cover=True)
    with pytest.raises(UserError, match="Its base changed since"):
        trainable_weights.load_into_model(
            model,
            trainable_weights.TrainableWeights({**weights.adapters, name: torch.zeros(1, 1)}, weights.weights),
            "s",
            must_cover=True,
        )
    full_model = tuned_model(base, TuningConfig(method=TuningMethod.full, **ALL_ROWS))
    with pytest.raises(UserError, match=r"has no matching parameter in this model.*launch/export.py"):
        trainable_weights.load_into_model(full_model, weights, "s", must_cover=False)
    quantised_model = tuned_model(base, TuningConfig(**METHODS["qlora"], **FROZEN))
    body_weights = trainable_weights.TrainableWeights(
        weights={"model.layers.0.mlp.up_proj.weight": torch.zeros(128, 64)}
    )
    with pytest.raises(UserError, match="is quantised here. Export that run"):
        trainable_weights.load_into_model(quantised_model, body_weights, "s", must_cover=False)


def _collect_untrained_weights(model) -> trainable_weights.TrainableWeights:
    return _collect_trainable_weights(model, {})


def test_an_expanded_base_is_quantised_with_embeddings_in_bfloat16(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", base_vocab_size=40)
    model = tuned_model(base, TuningConfig(**METHODS["qlora"], **FROZEN), precision=Precision.bf16)
    assert model.get_input_embeddings().weight.dtype is torch.bfloat16
    assert model.get_output_embeddings().weight.dtype is torch.bfloat16
    quantised_parameters = [parameter for parameter in model.parameters() if tuning.is_quantised(parameter)]
    assert len(quantised_parameters) == 14
    assert {parameter.dtype for parameter in quantised_parameters} == {torch.uint8}
    sharded_model = tuned_model(
        base, TuningConfig(**METHODS["qlora"], **FROZEN), precision=Precision.bf16, zero_stage=3
    )
    assert all(p.dtype is torch.bfloat16 for p in sharded_model.parameters() if p.dim() > 1 and not p.requires_grad)


def test_a_wrong_tokenizer_and_another_architecture_are_refused(base: Path, encoder) -> None:
    with pytest.raises(UserError, match=r"the embeddings have 60 rows but the tokenizer .* has 400 tokens"):
        load.read_config(ModelConfig(init=ModelInit.pretrained, path=str(base)), encoder)
    with pytest.raises(UserError, match=r"has hidden_size=64, model.architecture has 4096"):
        load.read_config(
            ModelConfig(init=ModelInit.pretrained, path=str(base), architecture={"hidden_size": 4096}), encoder
        )
    with pytest.raises(UserError, match="model.path=: no config.json there. Give the directory"):
        load.read_config(app.compose("plan", ["model=llama2_7b", "optim.steps=1"]).model, encoder)


def test_weights_of_a_later_stage_override_those_of_an_earlier_one() -> None:
    matrix, rows = torch.arange(12.0).reshape(6, 2), -torch.ones(2, 2)
    earlier = trainable_weights.TrainableWeights({"a": torch.ones(1)}, {"e.weight": matrix, "n": torch.zeros(3)})
    later = trainable_weights.TrainableWeights({"a": torch.zeros(1)}, {"e.weight": rows}, {"e.weight": 4})
    combined = later.over(earlier)
    assert torch.equal(combined.weights["e.weight"], torch.cat([matrix[:4], rows]))
    assert combined.first_rows == {}
    assert combined.adapters["a"] == 0
    assert torch.equal(combined.weights["n"], torch.zeros(3))
    reversed_order = earlier.over(later)
    assert torch.equal(reversed_order.weights["e.weight"], matrix)
    assert reversed_order.first_rows == {}
    assert later.over(trainable_weights.TrainableWeights(weights={"n": torch.ones(1)})).first_rows == {"e.weight": 4}


def test_adapters_start_from_a_fully_trained_tied_model(tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "base", tie_word_embeddings=True, base_vocab_size=40)
    full_model = tuned_model(base, TuningConfig(method=TuningMethod.full, **ALL_ROWS))
    train_steps(full_model)
    weights = trainable_weights.TrainableWeights(weights=full_model.state_dict())
    trainable_files.save_trainable_weights(weights, tmp_path / "start")
    assert len(trainable_files.load_trainable_weights(tmp_path / "start").weights) == len(weights.weights) - 1
    model = tuned_model(base, TuningConfig(**METHODS["lora"], **NEW_ROWS))
    trainable_weights.load_into_model(
        model, trainable_files.load_trainable_weights(tmp_path / "start"), "start", must_cover=False
    )
    ids = torch.randint(0, 60, (1, 11))
    torch.testing.assert_close(model(ids).logits, full_model(ids).logits)


def test_dora_magnitudes_are_reset_to_the_weights_of_an_earlier_stage(base: Path) -> None:
    full_model = tuned_model(base, TuningConfig(method=TuningMethod.full, **ALL_ROWS))
    train_steps(full_model)
    model = tuned_model(base, TuningConfig(**METHODS["dora"], **FROZEN))
    trainable_weights.load_into_model(
        model, trainable_weights.TrainableWeights(weights=dict(full_model.state_dict())), "start", must_cover=False
    )
    ids = torch.randint(0, 60, (1, 11))
    assert (model(ids).logits - full_model(ids).logits).abs().max() > 1e-4
    magnitudes = {name.removesuffix(".default.weight") for name, _ in model.named_parameters() if "magnitude" in name}
    reset_dora_magnitudes(model, except_names=magnitudes)
    assert (model(ids).logits - full_model(ids).logits).abs().max() > 1e-4
    reset_dora_magnitudes(model, except_names=())
    torch.testing.assert_close(model(ids).logits, full_model(ids).logits)


def test_settings_without_effect_are_refused(base: Path) -> None:
    for settings, message in (
        ({"method": TuningMethod.lora, "bits": 8}, "tuning.bits=8: only tuning=qlora"),
        ({"method": TuningMethod.full, "use_dora": True}, "tuning.use_dora=True: tuning=full has no adapters"),
        ({"method": TuningMethod.freeze, "loraplus_lr_ratio": 16.0}, "tuning=freeze has no adapters"),
        ({"method": TuningMethod.lora, "alpha": 0.0}, "tuning.alpha=0.0: must be greater than 0"),
    ):
        with pytest.raises(UserError, match=message):
            TuningConfig(**settings, **FROZEN)
    with pytest.raises(UserError, match="matches only embeddings or head. Leave it out, and give tuning.embeddings"):
        tuned_model(base, TuningConfig(method=TuningMethod.freeze, trainable=["embed_tokens"], **FROZEN))
