"""The packed forward pass equals the model's own, document by document, in loss and gradients."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from fireflyds import registry
from fireflyds.models.fuse import fuse
from fireflyds.types import IGNORE_INDEX

FAMILIES = "fireflyds.models.families"


def tiny(family: str, **changes):
    torch.manual_seed(0)
    settings = {
        "vocab_size": 50,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return AutoModelForCausalLM.from_config(
        AutoConfig.for_model(registry.find(FAMILIES, family).FAMILY.model_type, **settings | changes)
    )


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", registry.names(FAMILIES))
def test_packed_equals_one_by_one(family: str, tied: bool) -> None:
    documents = [torch.randint(0, 50, (length,)) for length in (7, 1, 12, 3)]
    plain = tiny(family, tie_word_embeddings=tied)
    expected = torch.zeros(())
    for ids in documents:
        logits = plain(ids[None]).logits[0, :-1]
        expected = expected + torch.nn.functional.cross_entropy(logits, ids[1:], reduction="sum")
    expected.backward()

    packed = fuse(tiny(family, tie_word_embeddings=tied))
    lengths = [len(ids) for ids in documents]
    labels = torch.cat([torch.cat([ids[1:], torch.tensor([IGNORE_INDEX])]) for ids in documents])
    batch = {
        "input_ids": torch.cat(documents)[None],
        "labels": labels[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "cu_seqlens": torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32),
        "max_seqlen": max(lengths),
    }
    loss = packed(**batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for (name, a), (_, b) in zip(packed.named_parameters(), plain.named_parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=name)
    torch.testing.assert_close(packed(**batch, reduction="none").sum(), loss)


def test_other_instances_of_the_class_stay_as_they_are() -> None:
    fuse(tiny("llama"))
    untouched = tiny("llama")
    assert untouched(torch.randint(0, 50, (1, 5))).logits.shape == (1, 5, 50)
