"""New rows are initialised from the old tokens of their piece; all other weights are unchanged."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from bases import KINDS
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fireflyds.config import HeadInit, ModelConfig, RowInit
from fireflyds.errors import UserError
from fireflyds.models.load import base_vocab_size
from fireflyds.tokenizer.base import load_base
from fireflyds.tokenizer.row_init import NewRows
from fireflyds.tokenizer.rows import check_model, expand_model

TINY_LLAMA = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def new_rows(num_tokens: int = 40, init: RowInit = RowInit.mean, **options) -> NewRows:
    return NewRows(num_tokens, [[3, 4], [5]], init, seed=0, **options)


def save_llama(folder: Path, *, tied: bool = False, vocab_size: int = 40) -> Path:
    LlamaForCausalLM(LlamaConfig(vocab_size=vocab_size, tie_word_embeddings=tied, **TINY_LLAMA)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_old_ids_contain_neither_bos_nor_the_dummy_prefix(kind: str, tmp_path: Path) -> None:
    base = load_base(KINDS[kind](tmp_path / "base"))
    ids, encoder = base.old_ids(base.spelled("河")), base.encoder([])
    assert len(ids) == 3
    assert set(ids) <= encoder.fragments()
    assert encoder.decode(ids).strip() == "河"


def test_mean_rows_are_means_of_old_rows() -> None:
    weight = torch.randn(40, 4)
    initialised = new_rows().make(weight)
    torch.testing.assert_close(initialised, torch.stack([(weight[3] + weight[4]) / 2, weight[5]]))


def test_a_head_may_begin_as_the_row_of_the_first_piece() -> None:
    weight = torch.randn(40, 4)
    rows = new_rows(init=RowInit.random, init_head=HeadInit.first_piece)
    torch.testing.assert_close(rows.make(weight, is_head=True), weight[[3, 5]])
    assert not torch.equal(rows.make(weight), weight[[3, 5]])
    mean_head = new_rows(init=RowInit.random, init_head=HeadInit.mean)
    torch.testing.assert_close(mean_head.make(weight, is_head=True)[0], (weight[3] + weight[4]) / 2)


def test_a_second_expansion_records_the_rows_before_each(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base")
    expand_model(base, tmp_path / "once", new_rows())
    result = expand_model(tmp_path / "once", tmp_path / "twice", new_rows(42))
    assert result["base_vocab_sizes"] == [40, 42]
    config = ModelConfig(path=str(tmp_path / "twice"))
    hf_config = AutoConfig.from_pretrained(tmp_path / "twice")
    assert base_vocab_size(config, hf_config) == 42
    assert base_vocab_size(ModelConfig(path=config.path, base_vocab_size=40), hf_config) == 40
    with pytest.raises(UserError, match="config.json has 40, 42"):
        base_vocab_size(ModelConfig(path=config.path, base_vocab_size=41), hf_config)


def test_weighted_rows_give_rare_tokens_more_weight() -> None:
    weight, frequency = torch.randn(40, 4), np.full(40, 1e-4)
    frequency[3], frequency[4] = 0.009, 0.0  # weights 1e-3 / (1e-3 + p): 0.1 and 1
    initialised = new_rows(init=RowInit.weighted, frequency=frequency).make(weight)
    torch.testing.assert_close(initialised[0], (0.1 * weight[3] + weight[4]) / 1.1)
    torch.testing.assert_close(initialised[1], weight[5])


@pytest.mark.parametrize("num_rows", [2000, 3])
def test_random_rows_have_the_mean_and_covariance_of_the_old(num_rows: int) -> None:
    mixing = torch.tensor([[3.0, 0, 0, 0], [2.9, 0.5, 0, 0], [0, 0, 1, 0], [0, 0, -1, 0.1]])
    weight = torch.randn(num_rows, 4) @ mixing.T + 5
    random_rows = NewRows(num_rows, [[0]] * 20_000, RowInit.random, seed=1)
    initialised = random_rows.make(weight)
    torch.testing.assert_close(initialised.mean(0), weight.mean(0), atol=0.1, rtol=0)
    torch.testing.assert_close(initialised.T.cov(), weight.T.cov(correction=0), atol=0.3, rtol=0.05)
    assert torch.equal(initialised, random_rows.make(weight))
    assert not torch.equal(initialised, NewRows(num_rows, [[0]] * 20_000, RowInit.random, seed=2).make(weight))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layout", ["safetensors", "shards", "bin", "bin_shards"])
def test_expanded_model_keeps_its_old_logits(tmp_path: Path, tied: bool, layout: str) -> None:
    base = rewrite_weights(save_llama(tmp_path / "base", tied=tied), layout)
    counts = expand_model(base, tmp_path / "out", new_rows())
    assert counts["parameters_after"] - counts["parameters_before"] == 2 * 16 * (1 if tied else 2)
    assert (counts["hidden_size"], counts["matrices"]) == (16, 1 if tied else 2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (42, tied)
    assert not list((tmp_path / "out").glob("*.bin*"))
    base_model = LlamaForCausalLM.from_pretrained(tmp_path / "plain" if layout != "safetensors" else base)
    expanded_model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.randint(0, 40, (1, 12))
    torch.testing.assert_close(expanded_model(ids).logits[..., :40], base_model(ids).logits, atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(
        expanded_model.model.embed_tokens.weight[40], base_model.model.embed_tokens.weight[3:5].mean(0)
    )
    torch.testing.assert_close(expanded_model.lm_head.weight[40], base_model.lm_head.weight[3:5].mean(0))
    index = tmp_path / "out" / "model.safetensors.index.json"
    assert index.exists() == (layout in ("shards", "bin_shards"))
    if index.exists():
        document = json.loads(index.read_text())
        for name, file in document["weight_map"].items():
            assert name in load_file(tmp_path / "out" / file)
        assert document["metadata"]["total_size"] == 4 * counts["parameters_after"]


def rewrite_weights(base: Path, layout: str) -> Path:
    """Rewrites the weights in another layout; the original is copied to `plain`."""
    if layout == "safetensors":
        return base
    shutil.copytree(base, base.with_name("plain"))
    weights = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    names = sorted(weights)
    parts = [names] if layout == "bin" else [names[:7], names[7:]]
    for number, part in enumerate(parts, 1):
        tensors = {name: weights[name] for name in part}
        if layout == "shards":
            save_file(tensors, base / f"model-{number:05d}-of-00002.safetensors", metadata={"format": "pt"})
        else:
            torch.save(
                tensors, base / ("pytorch_model.bin" if layout == "bin" else f"pytorch_model-0000{number}-of-00002.bin")
            )
    return base


def test_new_rows_replace_padding_rows(tmp_path: Path) -> None:
    expand_model(save_llama(tmp_path / "base", vocab_size=64), tmp_path / "out", new_rows(40))
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert weights["model.embed_tokens.weight"].shape == weights["lm_head.weight"].shape == (42, 16)


def test_a_tied_copy_of_the_head_is_dropped(tmp_path: Path) -> None:
    base = save_llama(tmp_path / "base", tied=True)
    weights = load_file(base / "model.safetensors")
    save_file(weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()}, base / "model.safetensors")
    expand_model(base, tmp_path / "out", new_rows())
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")


def test_models_with_inconsistent_weight_tying_are_refused(tmp_path: Path) -> None:
    tied, untied = save_llama(tmp_path / "tied", tied=True), save_llama(tmp_path / "untied")
    for folder, key in ((tied, '"tie_word_embeddings": true'), (untied, '"tie_word_embeddings": false')):
        file = folder / "config.json"
        assert key in file.read_text()
        file.write_text(
            file.read_text().replace(key, key.replace("true", "no").replace("false", "true").replace("no", "false"))
        )
    with pytest.raises(UserError, match="tie_word_embeddings is false, but there is no head"):
        expand_model(tied, tmp_path / "a", new_rows())
    with pytest.raises(UserError, match="tie_word_embeddings is true, but the head's weights differ"):
        expand_model(untied, tmp_path / "b", new_rows())


def test_rows_that_disagree_with_the_config_are_refused(tmp_path: Path) -> None:
    file = save_llama(tmp_path) / "config.json"
    text = file.read_text()
    file.write_text(text.replace('"vocab_size": 40', '"vocab_size": 41'))
    with pytest.raises(UserError, match=r"has 40 rows but config.json has vocab_size=41"):
        expand_model(tmp_path, tmp_path / "out", new_rows())
    file.write_text(text.replace('"vocab_size": 40', '"vocab_size": 39'))
    with pytest.raises(UserError, match=r"vocab_size=39, fewer than the tokenizer's 40 tokens"):
        expand_model(tmp_path, tmp_path / "out", new_rows())


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    (save_llama(tmp_path) / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no weights there \(model\*.safetensors or pytorch_model\*.bin\)"):
        expand_model(tmp_path, tmp_path / "out", new_rows())


def test_weights_outside_the_index_are_ignored(tmp_path: Path) -> None:
    base = rewrite_weights(save_llama(tmp_path / "base"), "shards")
    files = sorted(base.glob("model-*.safetensors"))
    weight_map = {name: file.name for file in files for name in load_file(file)}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    save_file({"other": torch.zeros(3)}, base / "consolidated.safetensors")
    counts = expand_model(base, tmp_path / "out", new_rows())
    assert sorted(file.name for file in (tmp_path / "out").glob("*.safetensors")) == [file.name for file in files]
    assert counts["parameters_before"] == sum(t.numel() for file in files for t in load_file(file).values())
    files[1].unlink()
    with pytest.raises(UserError, match="is missing, which model.safetensors.index.json names"):
        check_model(base, 40)


@pytest.mark.parametrize("name", ["../victim/model.safetensors", "{victim}", "..", ""])
def test_an_index_with_a_path_outside_the_model_is_refused_before_reading(tmp_path: Path, name: str) -> None:
    outside_file = save_llama(tmp_path / "victim") / "model.safetensors"
    content = outside_file.read_bytes()
    base = save_llama(tmp_path / "base")
    weight_map = {key: name.format(victim=outside_file) for key in load_file(outside_file)}
    (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    for check in (lambda: check_model(base, 40), lambda: expand_model(base, tmp_path / "out", new_rows())):
        with pytest.raises(UserError, match=r"model\.safetensors\.index\.json: names the file .* no plain file name"):
            check()
    assert outside_file.read_bytes() == content
    assert not list(tmp_path.glob("out/*.safetensors"))


def test_tensors_that_share_storage_are_both_written(tmp_path: Path) -> None:
    base = rewrite_weights(save_llama(tmp_path / "base"), "bin")
    weights = torch.load(base / "pytorch_model.bin")
    weights["model.layers.1.input_layernorm.weight"] = weights["model.layers.0.input_layernorm.weight"]
    torch.save(weights, base / "pytorch_model.bin")
    expand_model(base, tmp_path / "out", new_rows())
    written = load_file(tmp_path / "out" / "model.safetensors")
    torch.testing.assert_close(
        written["model.layers.1.input_layernorm.weight"], weights["model.layers.0.input_layernorm.weight"]
    )


@pytest.mark.parametrize("layout", ["safetensors", "bin"])
def test_errors_name_a_truncated_file(tmp_path: Path, layout: str) -> None:
    base = rewrite_weights(save_llama(tmp_path / "base"), layout)
    file = next(file for file in base.iterdir() if file.suffix in (".safetensors", ".bin"))
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UserError, match=f"{file.name}: cannot be read"):
        check_model(base, 40)


@pytest.mark.parametrize("value", [40, [2, 40]])
def test_special_ids_beyond_the_tokenizer_are_refused(tmp_path: Path, value) -> None:
    base = save_llama(tmp_path / "base", vocab_size=64)
    file = base / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": value}))
    with pytest.raises(
        UserError, match=r"generation_config.json: eos_token_id is 40, but the tokenizer has no such token"
    ):
        check_model(base, 40)
