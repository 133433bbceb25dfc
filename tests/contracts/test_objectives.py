"""Every objective entry reads fields that a batch has, counts its targets, and gives the same loss as its parts."""

import pytest
import torch

from fireflyds import app, registry
from fireflyds.errors import UserError
from fireflyds.models.packed.forward import fuse
from fireflyds.testing.models import loss_of_documents, random_documents, tiny_model
from fireflyds.train.objectives import PACKAGE, load_objective
from fireflyds.types import PackedBatch


@pytest.mark.parametrize("name", registry.names(PACKAGE))
def test_an_entry_has_an_option_of_its_name_and_reads_fields_of_a_batch(name: str) -> None:
    config = app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=3", f"objective={name}"])
    objective = load_objective(config.objective)
    batch = PackedBatch.from_documents([ids.tolist() for ids in random_documents()])
    model = fuse(tiny_model("llama"))
    loss_sum, token_losses = model(**batch.model_inputs("cpu"), compute=objective)
    assert loss_sum.dim() == 0
    assert loss_sum.requires_grad
    assert token_losses.shape == batch.labels[0].shape
    assert not token_losses.requires_grad
    torch.testing.assert_close(token_losses.sum(), loss_sum.detach())
    assert 0 < objective.count(batch) <= batch.num_learned


def test_an_objective_that_requires_fields_a_batch_does_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=3"]).objective
    monkeypatch.setattr(type(load_objective(config)), "requires", ("labels", "pairs"))
    with pytest.raises(UserError, match="^objective.name=causal_lm: requires pairs, which a batch does not have"):
        load_objective(config)


def test_causal_lm_is_the_sum_over_documents_alone() -> None:
    config = app.compose("train", ["run=x", "model=a/b", "data=c/d", "optim.steps=3"])
    objective = load_objective(config.objective)
    batch = PackedBatch.from_documents([ids.tolist() for ids in random_documents()])
    loss_sum, _ = fuse(tiny_model("llama"))(**batch.model_inputs("cpu"), compute=objective)
    torch.testing.assert_close(
        loss_sum, loss_of_documents(tiny_model("llama"), random_documents()), rtol=1e-5, atol=1e-5
    )
    assert objective.count(batch) == sum(len(ids) - 1 for ids in random_documents())
