"""Tokenizer, store and base that do not match, or are incomplete, are errors."""

import json
import shutil
import threading
import time

import pytest
import torch
from samples import ENGLISH
from transformers import AutoModelForCausalLM, LlamaConfig

from fireflyds.config import DoctorConfig
from fireflyds.data.store.store import MANIFEST
from fireflyds.doctor import input_files
from fireflyds.doctor.check import Severity
from fireflyds.testing.stores import write_store
from fireflyds.tokenizer.hf_files import write_tokenizer
from fireflyds.tokenizer.learn import learn_bpe
from fireflyds.types import Example


def _model(folder, rows: int, **overrides):
    torch.manual_seed(0)
    settings = {
        "vocab_size": rows,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    config = LlamaConfig(**settings | overrides)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="10KB")
    return folder


def _store(folder, fingerprint: str):
    import numpy as np

    write_store(folder, {"zh": [Example(np.arange(5, dtype=np.int64), ((0, 5),), 9)]})
    manifest = json.loads((folder / MANIFEST).read_text())
    manifest["made_from"]["tokenizer"] = fingerprint
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


def _severities(**inputs) -> dict[str, Severity]:
    return {check.name: check.severity for check in _checks(**inputs).values()}


def _checks(**inputs):
    return {
        check.name: check
        for check in input_files.check_all(DoctorConfig(**{key: str(value) for key, value in inputs.items()}))
    }


def test_without_inputs_there_are_no_checks() -> None:
    assert input_files.check_all(DoctorConfig()) == []


def test_matching_inputs_are_ok(tmp_path, base_tokenizer, encoder) -> None:
    model = _model(tmp_path / "model", encoder.vocab_size + 64)
    store = _store(tmp_path / "store", encoder.fingerprint())
    checks = _checks(model=model, tokenizer=base_tokenizer, data=store)
    assert {name: check.severity.name for name, check in checks.items()} == dict.fromkeys(
        ("tokenizer", "weights", "base", "store"), "ok"
    )
    assert "1 documents, 5 tokens, made with this tokenizer" in checks["store"].message
    assert f"{encoder.vocab_size + 64:,} rows for {encoder.vocab_size:,} pieces" in checks["base"].message


def test_a_store_of_another_tokenizer_is_an_error(tmp_path, base_tokenizer, encoder) -> None:
    other_tokenizer = tmp_path / "other"
    from sentencepiece import sentencepiece_model_pb2 as sp_pb2

    proto = sp_pb2.ModelProto()
    proto.ParseFromString(learn_bpe(ENGLISH, vocab_size=380, max_piece_length=12))
    write_tokenizer(proto, other_tokenizer)
    store = _store(tmp_path / "store", encoder.fingerprint())
    assert _severities(tokenizer=base_tokenizer, data=store)["store"] is Severity.ok
    check = _checks(tokenizer=other_tokenizer, data=store)["store"]
    assert check.severity is Severity.error
    assert "made with another tokenizer" in check.message
    assert f"prepare.py tokenizer={other_tokenizer}" in check.remedy


def test_a_store_without_a_tokenizer_is_opened_and_reported_as_not_compared(tmp_path) -> None:
    store = _store(tmp_path / "store", "abc")
    check = _checks(data=store)["store"]
    assert check.severity is Severity.warning
    assert "not compared" in check.message
    next((store / "parts").glob("*.ids")).write_bytes(b"")
    assert "has 0 tokens, the manifest records 5" in _checks(data=store)["store"].message
    missing = _checks(data=tmp_path / "nowhere")["store"]
    assert missing.severity is Severity.error
    assert missing.message.startswith(f"data={tmp_path / 'nowhere'}")


@pytest.mark.parametrize(("rows", "severity"), [(-1, Severity.error), (0, Severity.ok), (1024, Severity.error)])
def test_rows_exceed_pieces_by_padding_only(tmp_path, base_tokenizer, encoder, rows: int, severity: Severity) -> None:
    model = _model(tmp_path / "model", encoder.vocab_size + rows)
    assert _severities(model=model, tokenizer=base_tokenizer)["base"] is severity


def test_different_special_ids_are_a_warning(tmp_path, base_tokenizer, encoder) -> None:
    model = _model(tmp_path / "model", encoder.vocab_size, eos_token_id=7)
    check = _checks(model=model, tokenizer=base_tokenizer)["base"]
    assert check.severity is Severity.warning
    assert "eos_token_id is 7 in config.json and 2 in the tokenizer" in check.message


def test_damaged_and_missing_weights_are_named(tmp_path, encoder) -> None:
    model = _model(tmp_path / "model", encoder.vocab_size)
    shards = sorted(model.glob("*.safetensors"))
    assert len(shards) > 1
    assert input_files.check_weights(model).severity is Severity.ok
    content = shards[0].read_bytes()
    lfs_pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for damaged_content in (content[:-1], content + b"x", content[:20], b"", b"not found, sorry: 404", lfs_pointer):
        shards[0].write_bytes(damaged_content)
        check = _checks(model=model)["weights"]
        assert check.severity is Severity.error
        assert f"{shards[0].name}: cannot be read as safetensors" in check.message
    shards[0].unlink()
    assert f"{shards[0].name} missing of {len(shards)} files" in _checks(model=model)["weights"].message
    (model / "model.safetensors.index.json").write_text("{")
    assert "model.safetensors.index.json: cannot be read as JSON" in _checks(model=model)["weights"].message


def test_weights_that_are_not_safetensors_are_checked_for_missing_and_empty_files(tmp_path) -> None:
    (tmp_path / "training_args.bin").write_bytes(b"args")
    assert "no weights there" in _checks(model=tmp_path)["weights"].message
    names = ["pytorch_model-00001-of-00002.bin", "pytorch_model-00002-of-00002.bin"]
    index = {"weight_map": {"a": names[0], "b": names[1]}}
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    (tmp_path / names[0]).write_bytes(b"weights")
    assert f"{names[1]} missing of 2 files" in _checks(model=tmp_path)["weights"].message
    (tmp_path / names[1]).touch()
    assert f"{names[1]} empty" in _checks(model=tmp_path)["weights"].message
    (tmp_path / names[1]).write_bytes(b"weights")
    check = input_files.check_weights(tmp_path)
    assert check.severity is Severity.ok
    assert check.message == f"{tmp_path}: {', '.join(names)} (not safetensors, their lengths are not known)"


def test_inputs_on_an_unresponsive_drive_are_errors_within_the_timeout(tmp_path, monkeypatch) -> None:
    release = threading.Event()
    monkeypatch.setattr(input_files, "load_encoder", lambda path: release.wait(30))
    monkeypatch.setattr(input_files, "TokenStore", lambda path, key: release.wait(30))
    monkeypatch.setattr(input_files, "_LEAST_SECONDS", 0.6)
    started = time.monotonic()
    checks = input_files.check_all(DoctorConfig(tokenizer="gone", data="gone", timeout=1))
    assert time.monotonic() - started < 5
    release.set()
    assert [(check.name, check.severity, check.message) for check in checks] == [
        ("tokenizer", Severity.error, "not read within 1 s"),
        ("store", Severity.error, "not read within 1 s"),
    ]


def test_an_invalid_tokenizer_or_model_is_an_error_and_does_not_end_the_report(tmp_path, base_tokenizer) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "unheard-of"}')
    checks = _checks(model=tmp_path, tokenizer=base_tokenizer, data=tmp_path / "none")
    assert {name: check.severity.name for name, check in checks.items()} == {
        "tokenizer": "ok",
        "weights": "error",
        "base": "error",
        "store": "error",
    }
    assert "unheard-of" in checks["base"].message
    shutil.copy(base_tokenizer / "tokenizer.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer.model").write_bytes(b"\0broken")
    assert _severities(tokenizer=tmp_path / "tokenizer.model")["tokenizer"] is Severity.error
