"""Scores equal those computed one sequence at a time with plain transformers."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from emulation import without_half_precision
from samples import CHINESE, ENGLISH
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from fireflyds import app
from fireflyds.errors import UserError
from fireflyds.evaluation.scorer import load_evaluated_model
from fireflyds.evaluation.tasks import load_task, task_options
from fireflyds.tokenizer.encoder import load_encoder


@pytest.fixture(scope="module")
def model(base_tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "m"
    shutil.copytree(base_tokenizer, folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _config(model: Path, *overrides: str):
    return app.compose("evaluate", [f"model={model}", *overrides])


def run_task(name: str, config) -> dict[str, float]:
    return load_task(name).evaluate(load_evaluated_model(config), task_options(name, config), config.limit)


def _log_likelihood(model: Path, prompt: list[int], continuation: list[int]) -> float:
    ids = torch.tensor([prompt + continuation])
    logits = AutoModelForCausalLM.from_pretrained(model)(ids).logits[0].log_softmax(-1)
    return sum(float(logits[len(prompt) - 1 + index, token]) for index, token in enumerate(continuation))


def test_a_bf16_model_is_scored_in_float32_if_bf16_is_emulated(model: Path, tmp_path: Path) -> None:
    bf16_model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    shutil.copytree(model, tmp_path / "half")
    bf16_model.save_pretrained(tmp_path / "half")
    with without_half_precision():
        assert load_evaluated_model(_config(tmp_path / "half")).model.dtype is torch.float32


def test_bits_per_byte_is_minus_log2_p_over_utf8_bytes(model: Path, tmp_path: Path) -> None:
    texts = [ENGLISH[0], CHINESE[0], "a"]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    encoder = load_encoder(model)
    nats = 0.0
    for text in texts:
        ids = [encoder.bos_id, *encoder.encode(text)]
        for start in range(0, len(ids) - 1, 63):  # windows of 64 tokens that share one
            window = ids[start : start + 64]
            nats -= _log_likelihood(model, window[:1], window[1:])
    config = _config(model, f"bits_per_byte.texts.all={tmp_path / 't.jsonl'}", "max_tokens=100")
    bits_per_byte = run_task("bits_per_byte", config)["all"]
    assert bits_per_byte == pytest.approx(nats / math.log(2) / sum(len(text.encode()) for text in texts), rel=1e-4)


def test_without_bos_in_documents_the_first_token_of_a_text_is_not_scored(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "no_bos"
    shutil.copytree(model, folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"add_bos_token": False}))
    text = "two ships"
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}) + "\n")
    encoder = load_encoder(folder)
    ids = encoder.encode(text)
    nats = -_log_likelihood(model, ids[:1], ids[1:])
    num_bytes = sum(encoder.token_bytes()[ids[1:]])
    config = _config(folder, f"bits_per_byte.texts.all={tmp_path / 't.jsonl'}", "max_tokens=100")
    assert run_task("bits_per_byte", config)["all"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-4)


def test_multiple_choice_selects_the_most_likely_text(model: Path, tmp_path: Path) -> None:
    encoder = load_encoder(model)
    rows, expected = [], 0
    for number in range(12):
        choices = ["two ships", "many horses near the bridge", "青岭镇"]
        prompt = [encoder.bos_id, *encoder.encode(ENGLISH[number])]
        scores = [_log_likelihood(model, prompt, encoder.encode(choice, continues=True)) for choice in choices]
        answer = number % 3
        expected += scores.index(max(scores)) == answer
        rows.append({"question": ENGLISH[number], "choices": choices, "answer": answer})
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = _config(model, f"multiple_choice.questions={tmp_path / 'q.jsonl'}")
    figures = run_task("multiple_choice", config)
    assert figures == {"accuracy": expected / 12, "chance": pytest.approx(1 / 3), "questions": 12}


def test_invalid_questions_are_named_by_line(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "q.jsonl"
    file.write_text(
        '{"question": "a", "choices": ["b", "c"], "answer": 0}\n{"question": "a", "choices": ["b", "c"], "answer": 2}\n'
    )
    config = _config(model, f"multiple_choice.questions={file}")
    with pytest.raises(UserError, match=r"q.jsonl:2: .* answer \(index\)"):
        run_task("multiple_choice", config)


def test_cmmlu_counts_correct_letters(model: Path, tmp_path: Path) -> None:
    for split in ("dev", "test"):
        (tmp_path / split).mkdir()
        lines = ["Question,A,B,C,D,Answer"] + [
            f"问{number},甲,乙,丙,丁,{letter}" for number, letter in enumerate("ABCD")
        ]
        (tmp_path / split / "anatomy.csv").write_text("\n".join(lines), encoding="utf-8")
    config = _config(model, f"cmmlu.data={tmp_path}", "cmmlu.num_shots=2")
    figures = run_task("cmmlu", config)
    assert figures["questions"] == 4
    assert figures["anatomy"] == figures["accuracy"] == figures["accuracy_mean_of_subjects"]
    (tmp_path / "dev" / "law.csv").write_text("Question,A,B,C,D,Answer\n问,甲,乙,丙,丁,B", encoding="utf-8")
    (tmp_path / "test" / "law.csv").write_text("Question,A,B,C,D,Answer\n问,甲,乙,丙,丁,A", encoding="utf-8")
    figures = run_task("cmmlu", config)
    assert figures["accuracy"] == pytest.approx((4 * figures["anatomy"] + figures["law"]) / 5)
    assert figures["accuracy_mean_of_subjects"] == pytest.approx((figures["anatomy"] + figures["law"]) / 2)
    config = _config(model, f"cmmlu.data={tmp_path}", "cmmlu.subjects=[physics]")
    with pytest.raises(UserError, match=r"no 'physics' in .*Known: anatomy, law"):
        run_task("cmmlu", config)


def test_chat_without_a_template_is_refused(model: Path) -> None:
    with pytest.raises(UserError, match="has no chat template. Use prompt=plain"):
        load_evaluated_model(_config(model, "prompt=chat"))
