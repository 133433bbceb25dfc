"""The doctor's proof that a packed row equals its separate documents, with correct and with wrong kernels."""

import pytest
import torch
from fireflyds_kernels import packed_attention
from transformers import AutoModelForCausalLM, LlamaConfig

from fireflyds.config import DoctorConfig, Precision
from fireflyds.doctor import packing_check
from fireflyds.doctor.check import Severity
from fireflyds.errors import UserError
from fireflyds.models.packed import boundaries, equivalence


@pytest.fixture
def model_folder(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=1,
        eos_token_id=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    return tmp_path


def _examine(folder, **options):
    config = DoctorConfig(packing=True, model=str(folder), documents=[7, 1, 30, 12], **options)
    model = packing_check.load_model(config, Precision.fp32)
    return list(equivalence.compare_implementations(model, config.documents, config.seed)), model


def test_a_correct_model_is_proven(model_folder) -> None:
    findings, model = _examine(model_folder, layers=2)
    assert model.config.num_hidden_layers == len(model.model.layers) == 2
    assert findings
    for finding in findings:
        assert finding.proven
        assert finding.loss < 1e-6
        assert 0 < finding.gradients < 1e-5
        assert finding.leakage == 0
    assert equivalence.table(findings).count("proven") == len(findings)


def test_an_attention_that_crosses_documents_is_caught(model_folder, monkeypatch) -> None:
    def attention_across_documents(q, k, v, cu_seqlens, *, max_seqlen, **options):
        one_document = torch.tensor([0, len(q)], dtype=torch.int32)
        return packed_attention(q, k, v, one_document, max_seqlen=len(q), **options)

    monkeypatch.setattr(boundaries, "packed_attention", attention_across_documents)
    findings, _ = _examine(model_folder)
    assert not any(finding.proven for finding in findings)
    assert min(finding.leakage for finding in findings) > 1e-4
    assert min(finding.gradients for finding in findings) > 1e-3
    assert "NOT EQUAL" in equivalence.table(findings)


def test_a_slightly_wrong_attention_is_caught(model_folder, monkeypatch) -> None:
    def scaled_attention(*arguments, **options):
        return packed_attention(*arguments, **options) * 1.01

    monkeypatch.setattr(boundaries, "packed_attention", scaled_attention)
    findings, _ = _examine(model_folder)
    assert not any(finding.proven for finding in findings)
    assert all(finding.leakage == 0 for finding in findings)


def test_configurations_that_cannot_be_examined_are_refused(model_folder, tmp_path) -> None:
    with pytest.raises(UserError, match="packing=true: needs a model"):
        DoctorConfig(packing=True)
    with pytest.raises(UserError, match=r"documents=\[3, 0\]"):
        DoctorConfig(documents=[3, 0])
    with pytest.raises(UserError, match="no config.json there"):
        packing_check.load_model(DoctorConfig(packing=True, model=str(tmp_path / "nothing")), Precision.fp32)
    with pytest.raises(UserError, match="device=tpu: not on this machine. Known: cpu"):
        packing_check.load_model(DoctorConfig(packing=True, model=str(model_folder), device="tpu"), Precision.fp32)
    model = packing_check.load_model(DoctorConfig(packing=True, model=str(model_folder)), Precision.fp32)
    with pytest.raises(UserError, match="documents: the longest=65: the model has 64 positions"):
        list(equivalence.compare_implementations(model, [65], 0))
    shallow_model = packing_check.load_model(
        DoctorConfig(packing=True, model=str(model_folder), layers=9), Precision.fp32
    )
    assert shallow_model.config.num_hidden_layers == 3


def test_the_proof_is_reported_as_a_finding(model_folder, monkeypatch) -> None:
    config = DoctorConfig(packing=True, model=str(model_folder), documents=[5, 9], precision=Precision.fp32)
    check, table = packing_check.check_packing(config)
    assert check.severity is Severity.ok
    assert "reference" in check.message
    assert "LlamaForCausalLM" in table
    assert "proven" in table

    def scaled_attention(*arguments, **options):
        return packed_attention(*arguments, **options) * 1.01

    monkeypatch.setattr(boundaries, "packed_attention", scaled_attention)
    check, table = packing_check.check_packing(config)
    assert check.severity is Severity.error
    assert "NOT EQUAL" in table
    assert "FIREFLYDS_KERNELS" in check.remedy


@pytest.mark.parametrize(
    ("error", "message", "remedy"),
    [
        (torch.OutOfMemoryError("CUDA out of memory"), "no memory left", "layers="),
        (RuntimeError("weights are broken\nmore"), "RuntimeError: weights are broken", "see `weights`"),
        (
            UserError("cannot be fused", key="model", value="x", remedy="Give another"),
            "model=x: cannot be fused",
            "Give another",
        ),
    ],
)
def test_an_error_during_the_proof_is_a_finding(model_folder, monkeypatch, error, message: str, remedy: str) -> None:
    def raise_error(*arguments, **options):
        raise error

    monkeypatch.setattr(equivalence, "fuse", raise_error)
    check, _ = packing_check.check_packing(DoctorConfig(packing=True, model=str(model_folder), documents=[5, 9]))
    assert check.severity is Severity.error
    assert message in check.message
    assert remedy in check.remedy


def test_a_proof_without_implementations_is_an_error(model_folder, monkeypatch) -> None:
    monkeypatch.setattr(equivalence, "_implementations", lambda model, device: [])
    check, _ = packing_check.check_packing(DoctorConfig(packing=True, model=str(model_folder), documents=[5, 9]))
    assert check.severity is Severity.error
    with pytest.raises(UserError, match=r"documents=\[1, 1\]: one token has none after it"):
        DoctorConfig(documents=[1, 1])


def test_invalid_configurations_are_refused_before_the_proof(model_folder) -> None:
    def validate(**options):
        packing_check.validate_config(
            DoctorConfig(packing=True, **{"model": str(model_folder), "documents": [64], **options})
        )

    validate()
    with pytest.raises(UserError, match="model=elsewhere: no config.json there"):
        validate(model="elsewhere")
    with pytest.raises(UserError, match="device=tpu: not on this machine"):
        validate(device="tpu")
    with pytest.raises(UserError, match="documents: the longest=65: the model has 64 positions"):
        validate(documents=[65])


def test_an_unknown_kernel_is_an_error_of_one_line(model_folder, verb) -> None:
    completed = verb(
        "doctor",
        "packing=true",
        f"model={model_folder}",
        "documents=[5,9]",
        "disk_mib=1",
        check=False,
        env={"FIREFLYDS_KERNELS": "foo"},
    )
    assert completed.returncode == 2
    assert (
        completed.stderr.strip()
        .splitlines()[-1]
        .startswith("error: FIREFLYDS_KERNELS: no implementation of any kernel")
    )
    assert "Traceback" not in completed.stderr
