"""Every optimizer entry builds over the groups of a tiny model, updates them, and holds the bytes of state that it
declares."""

import pytest
import torch

from fireflyds import app, registry
from fireflyds.optim.optimizers import PACKAGE, build_optimizer, load_optimizer_spec
from fireflyds.optim.param_groups import parameter_groups
from fireflyds.testing.models import tiny_model


@pytest.mark.parametrize("name", registry.names(PACKAGE))
def test_an_entry_has_an_option_of_its_name_and_declares_its_state(name: str) -> None:
    config = app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=3", f"optim={name}", "optim.lr=1e-2"])
    assert config.optim.name == name
    spec = load_optimizer_spec(name)
    model = tiny_model("llama", hidden_size=64, intermediate_size=256, vocab_size=128)
    groups = parameter_groups(model, config)
    assert all(group.as_matrices == (spec.treats_matrices_apart and group.name == "matrices") for group in groups)
    if name == "muon":  # needs a process group
        return
    optimizer = build_optimizer(groups, config)
    values_before = [parameter.detach().clone() for group in groups for parameter in group.parameters]
    model(torch.arange(16)[None], labels=torch.arange(16)[None]).loss.backward()
    optimizer.step()
    values_after = [parameter for group in groups for parameter in group.parameters]
    assert all(not torch.equal(old, new) for old, new in zip(values_before, values_after, strict=True) if new.dim() > 1)
    for group, settings in zip(groups, optimizer.param_groups, strict=True):
        assert settings["initial_lr"] == group.lr
        for parameter in group.parameters:
            # bitsandbytes keeps four bytes for parameters of fewer than 4096 numbers, and a scale for each block of
            # 256.
            if parameter.numel() >= 4096:
                state = optimizer.state[parameter]
                state_bytes = sum(
                    tensor.numel() * tensor.element_size()
                    for tensor in state.values()
                    if torch.is_tensor(tensor) and tensor.dim()
                )
                declared_bytes = spec.state_bytes_of(group) * parameter.numel()
                assert declared_bytes <= state_bytes <= declared_bytes * 1.02 + 5000


def test_muon_declares_four_state_bytes_for_matrices_alone() -> None:
    config = app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=3", "optim=muon"])
    groups = {group.name: group for group in parameter_groups(tiny_model("llama"), config)}
    spec = load_optimizer_spec("muon")
    assert spec.state_bytes_of(groups["matrices"]) == 4
    assert spec.state_bytes_of(groups["norms"]) == spec.state_bytes_of(groups["embeddings"]) == 8
