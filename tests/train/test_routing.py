"""Losses of routers and the load of experts: values against transformers' own on single documents, and in training."""

import importlib
from typing import Any

import numpy as np
import pytest
import torch
from architectures import FAST, SLOW, SMALL, model_of
from grid import case, near, run_cases
from torch import Tensor
from transformers import AutoConfig

from fireflyds import app
from fireflyds.checkpoint.init_from import read_trainable_weights
from fireflyds.config import ObjectiveConfig
from fireflyds.errors import UserError
from fireflyds.models.packed.forward import fuse
from fireflyds.testing.models import tiny_model
from fireflyds.train.routing import StepRouting, require_router_losses
from fireflyds.types import IGNORE_INDEX, PackedBatch

AUX, Z = 0.5, 0.25
# A choice by softmax, by logits with a bias, beside dense layers, and by sigmoid, where transformers' loss is the same.
NAMES = ["qwen3_moe", "gpt_oss", "ernie4_5_moe", "minimax_m2", "mixtral", "olmoe"]
STAGES = (0, 1, 2, 3)


def documents() -> tuple[list[Tensor], list[Tensor]]:
    """Three documents and their labels, of which every third token has none."""
    generator = torch.Generator().manual_seed(1)
    ids = [torch.randint(3, 120, (length,), generator=generator) for length in (17, 1, 40)]
    labels = [torch.cat([of_document[1:], torch.tensor([IGNORE_INDEX])]) for of_document in ids]
    for of_document in labels:
        of_document[::3] = IGNORE_INDEX
    return ids, labels


def packed(ids: list[Tensor], labels: list[Tensor]) -> PackedBatch:
    return PackedBatch.from_flat(
        torch.cat(ids).numpy(), torch.cat(labels).numpy(), np.array([len(of_document) for of_document in ids])
    )


def expected_losses(model: Any, ids: list[Tensor], labels: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sum of the token losses, transformers' load-balancing loss and the z-loss, of documents one by one."""
    outputs = [model(of_document[None], output_router_logits=True) for of_document in ids]
    logits = tuple(torch.cat(layer) for layer in zip(*(output.router_logits for output in outputs), strict=True))
    targets = torch.cat(labels)
    learned = targets != IGNORE_INDEX
    balance = importlib.import_module(type(model).__module__).load_balancing_loss_func
    config = model.config
    num_experts = logits[0].shape[1]
    aux = balance(logits, num_experts, getattr(config, "num_experts_per_tok", None) or config.moe_k, learned[None])
    z = torch.stack([layer[learned].logsumexp(dim=1).square().mean() for layer in logits]).mean()
    token_logits = torch.cat([output.logits[0] for output in outputs])
    return torch.nn.functional.cross_entropy(token_logits[learned], targets[learned], reduction="sum"), aux, z


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_router_losses_and_their_gradients_are_transformers_own(name: str, checkpointing: bool) -> None:
    architecture = {**FAST, **SLOW}[name]
    model, plain = fuse(model_of(*architecture)).train(), model_of(*architecture).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    ids, labels = documents()
    loss, aux, z = expected_losses(plain, ids, labels)
    batch = packed(ids, labels)
    (loss + batch.num_learned * (AUX * aux + Z * z)).backward()

    routing = StepRouting(
        model.packing.routing, ObjectiveConfig(name="causal_lm", router_aux_loss=AUX, router_z_loss=Z)
    )
    inputs = batch.model_inputs(torch.device("cpu"))
    counts = batch.num_learned, batch.num_learned
    for _ in range(2):  # a second micro-batch adds as much again
        routing.with_router_losses(model(**inputs), inputs["labels"][0], *counts).backward()
    for (key, parameter), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        if expected.grad is not None:
            scale = float(expected.grad.abs().max())
            torch.testing.assert_close(parameter.grad / 2, expected.grad, rtol=1e-4, atol=1e-5 * scale + 1e-6, msg=key)
    sums = routing.sums()
    assert sums is not None
    metrics = routing.metrics(sums.numpy(), 2 * batch.num_learned)
    assert metrics["router_aux_loss"] == pytest.approx(aux.item(), rel=1e-5)
    assert metrics["router_z_loss"] == pytest.approx(z.item(), rel=1e-5)


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_the_load_of_experts_is_that_of_the_chosen_ones(name: str) -> None:
    model, plain = fuse(model_of(*FAST[name])).train(), model_of(*FAST[name]).train()
    ids, labels = documents()
    chosen: dict[str, list[Tensor]] = {}

    def keep(key: str, inputs: Any) -> None:
        chosen.setdefault(key, []).append(inputs[1])

    for key, module in plain.named_modules():
        if key.endswith(".experts"):
            module.register_forward_pre_hook(lambda module, inputs, key=key: keep(key, inputs))
    for of_document in ids:
        plain(of_document[None])
    counts = torch.stack([torch.cat(parts).flatten().bincount(minlength=4) for parts in chosen.values()]).double()
    counts[:, 3] = 0  # as if another rank's counts were all of the others

    routing = StepRouting(model.packing.routing, ObjectiveConfig(name="causal_lm"))
    model(**packed(ids, labels).model_inputs(torch.device("cpu")))
    sums = routing.sums()
    assert sums is not None
    assert torch.equal(sums[2:].view_as(counts)[:, :3], counts[:, :3])
    metrics = routing.metrics(torch.cat([sums[:2], counts.flatten()]).numpy(), 1)
    layers = [1] if name == "deepseek_v3" else [0, 1]
    assert metrics == pytest.approx(
        {f"expert_load/{layer}": float(row.max() / row.mean()) for layer, row in zip(layers, counts, strict=True)}
        | {"experts_unused": 0.25}
    )
    routing.start_step()
    model.eval()(**packed(ids, labels).model_inputs(torch.device("cpu")))
    after = routing.sums()
    assert after is not None
    assert not after.any()  # a validation is not counted


@pytest.mark.parametrize(
    ("key", "name", "reason"),
    [
        ("router_aux_loss", "deepseek_v3", "deepseek_v3: its routers balance the load otherwise"),
        ("router_z_loss", "gemma2", "gemma2: it has no experts"),
    ],
)
def test_architectures_without_the_loss_are_refused(key: str, name: str, reason: str) -> None:
    model_type, changes = FAST[name]
    hf_config = AutoConfig.for_model(model_type, **SMALL | changes)
    with pytest.raises(UserError, match=rf"objective.{key}=0.1: .*{reason}"):
        require_router_losses(ObjectiveConfig(name="causal_lm", **{key: 0.1}), hf_config)
    require_router_losses(ObjectiveConfig(name="causal_lm"), hf_config)


def test_a_coefficient_is_at_least_zero() -> None:
    with pytest.raises(UserError, match=r"objective.router_aux_loss=-1.0: must be at least 0"):
        app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=1", "objective.router_aux_loss=-1"])


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("experts")
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
    base = folder / "base"
    tiny_model("qwen3_moe", num_key_value_heads=2, initializer_range=0.1, **sizes).save_pretrained(base)
    losses = ["objective.router_aux_loss=0.5", "objective.router_z_loss=0.1"]
    adapters, checkpointing = ["tuning.experts=true"], "hardware.gradient_checkpointing=true"
    cases = {}
    for stage in STAGES:
        cases[f"full {stage}"] = case(base, "full", stage, *losses)
        cases[f"lora {stage}"] = case(base, "lora", stage, *adapters, run_dir=str(folder / f"lora-{stage}"))
    for stage in (2, 3):
        cases[f"full again {stage}"] = case(base, "full", stage, *losses, checkpointing)
        cases[f"lora again {stage}"] = case(base, "lora", stage, *adapters, checkpointing)
        cases[f"qlora {stage}"] = case(base, "qlora", stage, *adapters)
        cases[f"half {stage}"] = case(base, "lora", stage, *adapters, steps=2, run_dir=str(folder / f"half-{stage}"))
        cases[f"rest {stage}"] = case(base, "lora", stage, *adapters, steps=2, resume=str(folder / f"half-{stage}"))
        options = [*losses, *adapters, "hardware.precision=bf16"]
        cases[f"waits {stage}"] = case(base, "lora", stage, *options, steps=2, rows=8, host_waits=True)
    cases["plain"] = case(base, "full", 2)
    cases["linear layers"] = case(base, "lora", 2)
    found = run_cases(folder, cases)
    found["folder"] = folder
    return found


@pytest.mark.parametrize("name", ["full", "lora"])
def test_experts_train_alike_at_every_zero_stage(results: dict, name: str) -> None:
    expected = results[f"{name} 0"]
    for other in (f"{name} 1", f"{name} 2", f"{name} 3", f"{name} again 2", f"{name} again 3"):
        assert results[other]["error"] is None
        near(results[other]["losses"], expected["losses"], 2e-6)
        for row, expected_row in zip(results[other]["extra"], expected["extra"], strict=True):
            keys = [key for key in expected_row if "expert" in key or "router" in key]
            assert len(keys) == (5 if name == "full" else 3)
            assert [row[key] for key in keys] == pytest.approx([expected_row[key] for key in keys], rel=1e-4)
    without = results["plain" if name == "full" else "linear layers"]["losses"]
    assert without[0] == pytest.approx(expected["losses"][0])  # the reported loss is the cross-entropy alone
    assert abs(without[-1] - expected["losses"][-1]) > 1e-3


def test_quantised_bases_train_with_adapters_on_their_experts_at_stage_3(results: dict) -> None:
    near(results["qlora 3"]["losses"], results["qlora 2"]["losses"], 2e-6)


@pytest.mark.parametrize("stage", [2, 3])
def test_adapters_of_experts_resume(results: dict, stage: int) -> None:
    near(results[f"half {stage}"]["losses"] + results[f"rest {stage}"]["losses"], results["lora 0"]["losses"], 2e-6)
    checkpoint = next((results["folder"] / f"lora-{stage}" / "checkpoints").glob("step-*"))
    names = read_trainable_weights(checkpoint).adapters.keys()
    experts = "model.layers.0.mlp.experts"
    assert {f"{experts}.lora_A.weight", f"{experts}.base_layer.lora_A.weight"} <= names


@pytest.mark.parametrize("stage", [2, 3])
def test_routing_waits_for_no_micro_batch(results: dict, stage: int) -> None:
    """ZeRO-3 compares the order of the parameters over all ranks in its first step."""
    waits = [(step, part) for step, part, _ in results[f"waits {stage}"]["host_waits"]]
    assert waits
    assert not [wait for wait in waits if wait[1] in ("forward", "backward") and (stage < 3 or wait[0] > 0)]
