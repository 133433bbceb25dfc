"""LoRA on the matrices of experts: packed training, merging and PEFT's files against an update computed by itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import EXPERTS, FAST, LENGTHS, SLOW, model_of
from peft import PeftModel
from transformers import AutoModelForCausalLM

from fireflyds import app
from fireflyds.checkpoint import trainable_files, trainable_weights
from fireflyds.checkpoint.trainable_weights import TrainableWeights, base_name
from fireflyds.config import TrainableRows, TuningConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.export.merged_weights import merged_entries
from fireflyds.export.publish import trained_logits
from fireflyds.metrics.flops import step_flops
from fireflyds.models.load import family_of
from fireflyds.models.packed.equivalence import compare_implementations
from fireflyds.models.tuning import adapter_config_of, apply_tuning
from fireflyds.optim.param_groups import notes_on_experts
from fireflyds.planner.activations import ForwardSpec, weight_bytes
from fireflyds.planner.model_shape import model_shape
from fireflyds.testing.models import save_tiny_llama, tiny_model

FROZEN = {"embeddings": TrainableRows.frozen, "head": TrainableRows.frozen}
KEYS = ["run=x", "model=a/b", "data=c/d", "optim.steps=3", "tuning.experts=true", "tuning.dropout=0"]
RANK, ALPHA = 2, 3.0
# Experts `[E, out, in]`, `[E, in, out]` with biases, `[E, in, out]` without transformers' decorator, some dense layers.
NAMES = ["qwen3_moe", "gpt_oss", "llama4", "deepseek_v3"]
TRANSPOSED = ["gpt_oss"]  # as PEFT sees it: for Llama 4 it takes rows for outputs


def tuned(model: Any, **changes: Any) -> Any:
    """The model with adapters on its experts, whose B is not zero."""
    options = {"method": TuningMethod.lora, "r": RANK, "alpha": ALPHA, "dropout": 0.0, "experts": True} | FROZEN
    apply_tuning(model, family_of(model.config), TuningConfig(**options | changes), None, 0)
    generator = torch.Generator().manual_seed(5)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1, generator=generator)
    return model


def updated_by_hand(name: str, model: Any) -> dict[str, torch.Tensor]:
    """The weights of the model without adapters plus each adapter's update, expert by expert, from PEFT's layout: A has
    the experts one after the other, in B they vary fastest. Of two wrappers around a module the inner is the second."""
    plain = model_of(*{**FAST, **SLOW}[name])
    weights = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    adapters = {base_name(key): p.detach() for key, p in model.named_parameters() if ".lora_" in key}
    for key, a in adapters.items():
        if not key.endswith("lora_A.weight"):
            continue
        owner, b = key.removesuffix(".lora_A.weight"), adapters[key.replace("lora_A", "lora_B")]
        if ".experts" not in owner or ".shared_experts" in owner:
            weights[f"{owner}.weight"] += ALPHA / RANK * (b @ a)
            continue
        inner = owner.endswith(".base_layer")
        # PEFT wraps the parameters in the order of the module: gate_up_proj first, down_proj around it.
        target = weights[f"{owner.removesuffix('.base_layer')}.{'gate_up_proj' if inner else 'down_proj'}"]
        for expert, weight in enumerate(target):
            update = b[:, expert :: len(target)] @ a[expert * RANK : (expert + 1) * RANK]
            weight += ALPHA / RANK * (update.T if name in TRANSPOSED else update)
    return weights


@pytest.mark.parametrize("name", NAMES)
def test_adapted_experts_compute_and_merge_what_the_update_by_hand_does(name: str) -> None:
    model, plain = tuned(model_of(*FAST[name])), model_of(*FAST[name])
    expected_weights = updated_by_hand(name, model)
    changed = [key for key, tensor in plain.state_dict().items() if not torch.equal(tensor, expected_weights[key])]
    assert sum(".experts." in key and "shared" not in key for key in changed) == (2 if name == "deepseek_v3" else 4)
    ids = torch.arange(3, 67)[None]
    logits = trained_logits(model, ids)
    merged = {key: entry.make() for key, entry in merged_entries(model).items()}
    assert merged.keys() == expected_weights.keys()
    for key, tensor in merged.items():
        torch.testing.assert_close(tensor, expected_weights[key], rtol=1e-6, atol=1e-6, msg=key)
    plain.load_state_dict(expected_weights)
    with torch.no_grad():
        expected = plain(ids).logits
    assert float((logits - expected).abs().max()) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("name", NAMES)
def test_adapted_experts_train_packed_as_on_single_documents(name: str) -> None:
    model = tuned(model_of(*FAST[name]))
    results = list(compare_implementations(model, LENGTHS, seed=1))
    assert results
    assert all(result.proven and result.gradients <= 1e-5 for result in results), results
    trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum(".experts." in key and "shared" not in key for key in trained) == (4 if name == "deepseek_v3" else 8)
    assert all(".lora_" in key for key in trained)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", sorted(key for key, (_, changes) in SLOW.items() if EXPERTS.items() <= changes.items())
)
def test_every_architecture_merges_its_adapted_experts(name: str) -> None:
    model, plain = tuned(model_of(*SLOW[name])), model_of(*SLOW[name])
    ids = torch.arange(3, 67)[None]
    logits = trained_logits(model, ids)
    plain.load_state_dict({key: entry.make() for key, entry in merged_entries(model).items()})
    with torch.no_grad():
        expected = plain(ids).logits
    assert float((logits - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def test_peft_reads_the_adapters_of_experts(tmp_path: Path) -> None:
    model_of(*FAST["qwen3_moe"]).save_pretrained(tmp_path / "base")
    model = tuned(AutoModelForCausalLM.from_pretrained(tmp_path / "base"))
    described = trainable_weights.describe_trainable_weights(model, adapter_config_of(model), {})
    readers = {key: p.detach().clone for key, p in model.named_parameters() if p.requires_grad}
    trainable_files.save_trainable_weights(trainable_weights.with_tensors(described, readers), tmp_path / "adapter")
    read = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(read.eval()(ids).logits, model.eval()(ids).logits, rtol=1e-6, atol=1e-6)


def test_adapters_of_experts_are_restored_by_name() -> None:
    model, other = tuned(model_of(*FAST["gpt_oss"])), model_of(*FAST["gpt_oss"])
    tuned(other)
    trained = {base_name(key): p.detach() for key, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == sum(p.requires_grad for p in model.parameters())
    for parameter in other.parameters():
        parameter.data.mul_(1 + parameter.requires_grad)
    trainable_weights.load_into_model(other, TrainableWeights(adapters=trained), "here", must_cover=True)
    for (key, tensor), restored in zip(model.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(tensor, restored), key


def test_adapters_of_experts_in_16_bits_are_trained_and_merged_in_float32() -> None:
    """As beside a quantised base, whose own adapters are in float32."""
    model = tuned(model_of(*FAST["gpt_oss"]).bfloat16())
    experts = model.get_submodule("model.layers.0.mlp.experts")
    a, b = experts.lora_A["default"].weight, experts.lora_B["default"].weight
    assert (a.dtype, b.dtype) == (torch.float32, torch.float32)
    down = experts.get_base_layer().down_proj
    merged = merged_entries(model)["model.layers.0.mlp.experts.down_proj"].make()
    for expert in range(4):
        update = b[:, expert::4] @ a[expert * RANK : (expert + 1) * RANK]
        torch.testing.assert_close(merged[expert], down[expert].float() + ALPHA / RANK * update.T)
    assert torch.isfinite(trained_logits(model, torch.arange(3, 67)[None])).all()


def test_the_plan_counts_the_experts_with_their_adapters_added() -> None:
    model, config = tuned(model_of(*FAST["qwen3_moe"])), app.compose("train", [*KEYS, "tuning=lora"])
    shape, without = model_shape(model, config), model_shape(model_of(*FAST["qwen3_moe"]), config)
    numel = 4 * (2 * 24 * 48 + 48 * 24)
    assert [block.adapted_experts for block in shape.blocks] == [numel, numel]
    assert [block.adapted_experts for block in without.blocks] == [0, 0]
    spec = ForwardSpec("cpu", 4, False, 0.0, False, False, False)
    assert weight_bytes(shape.blocks[0], spec) == 4 * numel


def test_flops_count_the_adapters_of_the_experts_that_a_token_is_sent_to() -> None:
    def flops(**changes: Any) -> float:
        model = tiny_model("qwen3_moe", num_experts=4, num_experts_per_tok=1, moe_intermediate_size=24, head_dim=8)
        return step_flops(tuned(model, target_modules=["q_proj"], **changes)).per_token

    # Two layers of gate_up (32 to 48) and down (24 to 32), A and B of rank 2: forward, weights' and inputs' gradients.
    # q_proj of the first block trains below them, so all have both gradients.
    assert flops() - flops(experts=False) == 2 * 2 * RANK * (32 + 48 + 24 + 32) * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dropout": 0.05}, r"tuning.dropout=0.05: adapters of experts .*Give tuning.dropout=0"),
        ({"use_dora": True}, r"tuning.use_dora=true: PEFT has no DoRA for experts"),
        ({"method": TuningMethod.full}, r"tuning.experts=True: tuning=full has no adapters"),
    ],
)
def test_what_adapters_of_experts_cannot_do_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        TuningConfig(**{"method": TuningMethod.lora, "dropout": 0.0, "experts": True} | FROZEN | changes)


def test_a_model_without_experts_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(save_tiny_llama(tmp_path / "base"))
    with pytest.raises(UserError, match=r"tuning.experts=true: LlamaForCausalLM has no experts"):
        tuned(model)


@pytest.mark.parametrize(("method", "note"), [("lora", None), ("qlora", "stay in 16 bits")])
def test_a_quantised_base_says_that_its_experts_are_not(method: str, note: str | None) -> None:
    notes = notes_on_experts(model_of(*FAST["qwen3_moe"]), app.compose("train", [*KEYS, f"tuning={method}"]))
    assert len(notes) == (note is not None)
    assert note is None or note in notes[0]


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_everything_but_the_routers_trains_by_their_names(name: str) -> None:
    """`tuning=freeze` with an expression that no router's name matches."""
    model = model_of(*FAST[name])
    rows = {"embeddings": TrainableRows.all, "head": TrainableRows.all}
    config = TuningConfig(method=TuningMethod.freeze, trainable=[r"^(?!.*\.mlp\.(gate|router)\.)"], **rows)
    apply_tuning(model, family_of(model.config), config, None, 0)
    frozen = {key.split(".", 3)[3] for key, parameter in model.named_parameters() if not parameter.requires_grad}
    assert frozen == ({"mlp.gate.weight"} if name == "qwen3_moe" else {"mlp.router.weight", "mlp.router.bias"})
