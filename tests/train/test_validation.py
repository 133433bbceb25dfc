"""Validation: metrics of held-out domains, the guard and samples; the state of training does not change."""

import json
import logging
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from bitsandbytes.nn import Linear8bitLt

from fireflyds import app, registry
from fireflyds.data.chat_template import find_template
from fireflyds.data.encode import encode_document, encode_sample
from fireflyds.errors import UserError
from fireflyds.models.packed.forward import fuse
from fireflyds.testing.models import loss_of_documents, tiny_model
from fireflyds.testing.stores import write_store
from fireflyds.train.generation_samples import encode_prompts, greedy_generate
from fireflyds.train.validation import evaluation_mode, open_validator
from fireflyds.types import Example, Message, Sample

EN = ["the old bridge over the river", "ships come in the morning and leave at night", "he said so"]
ZH = ["青岭镇的特产是蜂蜜。", "清水河"]


@pytest.fixture(autouse=True)
def _process_group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """The attributes of an engine that validation uses."""

    device = torch.device("cpu")

    def __init__(self, **changes) -> None:
        self.module = fuse(tiny_model("llama", vocab_size=400, num_key_value_heads=2, **changes))


class RecordingLogger:
    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.samples: list[tuple] = []
        self.messages: list[str] = []
        self.log = logging.Logger("validation")
        self.log.addHandler(handler := logging.Handler())
        handler.emit = lambda record: self.messages.append(record.getMessage())  # type: ignore[method-assign]

    def log_validation(self, row) -> None:
        self.rows.append(row)

    def log_samples(self, step, samples) -> None:
        self.samples.append((step, samples))


@pytest.fixture
def make_validator(tmp_path: Path, encoder, base_tokenizer: Path):
    """Opens a validator of two held-out domains; training data are documents, or dialogues of a template."""
    examples = {"en": [encode_document(encoder, text) for text in EN], "zh": [encode_document(encoder, t) for t in ZH]}
    held_out = write_store(tmp_path / "held", examples, 400)
    manifest = tmp_path / "held" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokenizer": "x"', f'"tokenizer": "{encoder.fingerprint()}"'))
    (tmp_path / "runs" / "r").mkdir(parents=True)

    def make(*overrides: str, template: str | None = None, engine: Engine | None = None):
        config = app.compose(
            "train",
            [
                "run=r",
                f"runs={tmp_path}/runs",
                "model=a/b",
                f"model.tokenizer={base_tokenizer}",
                "data=c/d",
                "optim.steps=9",
                "seq_len=64",
                f"validation.store={tmp_path}/held",
                "validation.every=2",
                *overrides,
            ],
        )
        held_out.manifest["template"] = template
        hf_config = (engine or Engine()).module.config
        return open_validator(config, encoder, held_out, hf_config, 9)

    return make


def read_rows(tmp_path: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "runs" / "r" / name).read_text().splitlines()]


@pytest.mark.parametrize("rows", [1, 3])
def test_bits_per_byte_equal_those_of_documents_evaluated_separately(
    tmp_path: Path, make_validator, encoder, rows: int
) -> None:
    engine, logger = Engine(), RecordingLogger()
    make_validator(f"micro_batch_size={rows}", f"global_batch_size={rows}").begin(engine, logger, 0)
    row = logger.rows[0]
    token_bytes, reference_model = encoder.token_bytes(), tiny_model("llama", vocab_size=400, num_key_value_heads=2)
    for domain, texts in (("en", EN), ("zh", ZH)):
        ids = [torch.from_numpy(encode_document(encoder, text).input_ids.astype(np.int64)) for text in texts]
        nats = float(loss_of_documents(reference_model, ids))
        tokens, num_bytes = (
            sum(len(input_ids) - 1 for input_ids in ids),
            sum(token_bytes[input_ids[1:]].sum() for input_ids in ids),
        )
        # A space is put before every text.
        assert num_bytes == sum(len(text.encode()) + 1 for text in texts)
        assert row[f"validation/loss/{domain}"] == pytest.approx(nats / tokens, rel=1e-5)
        assert row[f"validation/bits_per_byte/{domain}"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert read_rows(tmp_path, "validation.jsonl")[0]["validation/loss/en"] == row["validation/loss/en"]


def _degrade(model) -> None:
    """Scales the head so that losses rise."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)


def test_the_guard_keeps_its_baseline_across_a_resume(tmp_path: Path, make_validator, encoder) -> None:
    engine, logger = Engine(), RecordingLogger()
    validator = make_validator("validation.max_rise=0.1")
    validator.begin(engine, logger, 0)
    assert validator.after(engine, logger, 1) is None
    assert validator.after(engine, logger, 2) is None
    assert [row["step"] for row in logger.rows] == [0, 2]
    assert not [line for line in logger.messages if "warning" in line]
    _degrade(engine.module)
    # A warning only: the run continues.
    assert validator.after(engine, logger, 4) is None
    baseline, degraded = (logger.rows[index]["validation/bits_per_byte/en"] for index in (0, 2))
    assert degraded > 1.1 * baseline
    message = (
        f"step 4: validation.guard=en: rose to {degraded:.4f} bits per byte, "
        f"{100 * (degraded / baseline - 1):.1f} % above its {baseline:.4f} at step 0"
    )
    assert f"warning: {message}" in logger.messages[-1]
    # Resumed at step 3: later rows are removed, the baseline stays.
    resumed, logger = make_validator("validation.max_rise=0.1", "validation.stop=true"), RecordingLogger()
    resumed.begin(engine, logger, 3)
    assert logger.rows == []
    assert [row["step"] for row in read_rows(tmp_path, "validation.jsonl")] == [0, 2]
    assert message in str(resumed.after(engine, logger, 4))
    assert [row["step"] for row in read_rows(tmp_path, "validation.jsonl")] == [0, 2, 4]


def test_a_validation_missed_at_a_stop_runs_after_the_resume(tmp_path: Path, make_validator) -> None:
    engine, logger = Engine(), RecordingLogger()
    make_validator().begin(engine, logger, 0)
    make_validator().begin(engine, logger, 4)
    assert [row["step"] for row in read_rows(tmp_path, "validation.jsonl")] == [0, 4]
    make_validator().begin(engine, logger, 4)
    make_validator().begin(engine, logger, 5)
    assert [row["step"] for row in read_rows(tmp_path, "validation.jsonl")] == [0, 4]
    # Other held-out rows have their own baseline.
    make_validator("validation.rows=1", "seq_len=16").begin(engine, logger, 5)
    assert [row["step"] for row in read_rows(tmp_path, "validation.jsonl")] == [0, 4, 5]


def test_a_nan_loss_counts_as_a_rise(tmp_path: Path, make_validator) -> None:
    engine, logger = Engine(), RecordingLogger()
    validator = make_validator("validation.stop=true")
    validator.begin(engine, logger, 0)
    with torch.no_grad():
        engine.module.model.norm.weight.fill_(float("nan"))
    assert "en: rose to nan" in str(validator.after(engine, logger, 2))
    assert read_rows(tmp_path, "validation.jsonl")[1]["validation/loss/en"] is None
    assert validator.newest["validation/loss/en"] is None


def test_a_nan_is_not_a_valid_baseline(tmp_path: Path, make_validator) -> None:
    engine, logger = Engine(), RecordingLogger()
    validator = make_validator("validation.stop=true", "validation.max_rise=0.1")
    weight = engine.module.model.norm.weight.detach().clone()
    with torch.no_grad():
        engine.module.model.norm.weight.fill_(float("nan"))
    error = validator.begin(engine, logger, 0)
    assert error is not None
    assert error.finding == "step 0: validation.guard=en: nan bits per byte is not a valid baseline"
    assert error.remedy.startswith("Give another model=")
    with torch.no_grad():
        engine.module.model.norm.weight.copy_(weight)
    assert validator.after(engine, logger, 2) is None
    _degrade(engine.module)
    assert "at step 2; validation.max_rise" in str(validator.after(engine, logger, 4))


def test_a_rise_measured_after_the_resume_ends_the_run(tmp_path: Path, make_validator) -> None:
    engine, logger = Engine(), RecordingLogger()
    assert make_validator("validation.stop=true").begin(engine, logger, 0) is None
    _degrade(engine.module)
    error = make_validator("validation.stop=true").begin(engine, logger, 4)
    assert "step 4: validation.guard=en: rose to" in str(error)
    (tmp_path / "runs" / "r" / "validation.jsonl").write_text("")
    assert make_validator().begin(engine, logger, 4) is None


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([], "validation.guard=en: no held-out domain (zh), nothing is guarded"),
        (
            [[5]],
            "warning: step 0: validation.guard=en: cannot be measured, none of its held-out documents has a token to "
            "learn. Give held-out documents of two tokens or more",
        ),
    ],
)
def test_a_guarded_domain_without_measurable_documents_is_logged(
    tmp_path: Path, make_validator, encoder, ids, message
) -> None:
    shutil.rmtree(tmp_path / "held")
    examples = [Example(np.array(input_ids), ((0, 1),), 1, is_document=True) for input_ids in ids]
    store = write_store(tmp_path / "held", {"en": examples, "zh": [encode_document(encoder, ZH[0])]}, 400)
    assert store.domains == ["en", "zh"]
    manifest = tmp_path / "held" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokenizer": "x"', f'"tokenizer": "{encoder.fingerprint()}"'))
    logger = RecordingLogger()
    assert make_validator().begin(Engine(), logger, 0) is None
    assert message in logger.messages
    if not ids:
        with pytest.raises(UserError, match=r"holds no document of that domain, .* It has: zh"):
            make_validator("validation.stop=true")


def _draw_random_numbers(*_) -> None:
    torch.rand(3)
    random.random()
    np.random.rand(2)


def test_random_states_and_training_modes_are_restored(make_validator) -> None:
    engine, logger = Engine(attention_dropout=0.0), RecordingLogger()
    model = engine.module.train()
    model.model.layers[0].eval()
    eight_bit = Linear8bitLt(4, 4, has_fp16_weights=False)
    eight_bit.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model.eight_bit = eight_bit
    modes_in_forward: list[bool] = []
    model.model.norm.register_forward_hook(lambda *_: modes_in_forward.append((model.training, eight_bit.training)))
    model.model.norm.register_forward_hook(_draw_random_numbers)
    modes = [module.training for module in model.modules()]
    validator = make_validator("validation.prompts=[a]", "validation.max_new_tokens=3")
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    random_states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    validator.begin(engine, logger, 0)
    assert modes_in_forward
    assert set(modes_in_forward) == {(False, True)}
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), random_states[2], strict=True))
    assert not any(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ZeroDivisionError), evaluation_mode(model, torch.device("cpu")):
        1 / 0  # noqa: B018
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("family", ["llama", "bloom", "falcon"])
def test_samples_equal_greedy_decoding(encoder, family: str) -> None:
    changes = {"num_key_value_heads": 2} if family == "llama" else {}
    reference_model, model = (tiny_model(family, vocab_size=400, **changes).eval() for _ in range(2))
    prompts = encode_prompts(encoder, None, ["the old bridge", "a", "青岭镇"], None)
    assert prompts.ids[1] == [encoder.bos_id, *encoder.encode("a")]
    samples = greedy_generate(fuse(model), prompts, 6, None, torch.device("cpu"))
    for ids, sample in zip(prompts.ids, samples, strict=True):
        expected_ids = list(ids)
        for _ in range(6):
            with torch.no_grad():
                expected_ids.append(int(reference_model(torch.tensor([expected_ids])).logits[0, -1].argmax()))
        new = expected_ids[len(ids) :]
        assert sample == (new[: new.index(encoder.eos_id)] if encoder.eos_id in new else new)
    assert any(samples)


def test_generation_ends_at_a_stop_token_and_at_max_positions(encoder) -> None:
    model = fuse(tiny_model("llama", vocab_size=400, num_key_value_heads=2).eval())
    prompts = encode_prompts(encoder, None, ["the old bridge", "a"], None)
    unbounded = greedy_generate(model, prompts, 8, None, torch.device("cpu"))
    max_positions = len(prompts.ids[0]) + 3
    assert len(greedy_generate(model, prompts, 8, max_positions, torch.device("cpu"))[0]) == 3
    stop = frozenset({unbounded[0][2]})
    stop_index = unbounded[0].index(unbounded[0][2])
    stopped = greedy_generate(model, type(prompts)(prompts.texts, prompts.ids, stop), 8, None, torch.device("cpu"))
    assert stopped[0] == unbounded[0][:stop_index]
    with pytest.raises(UserError, match=r"validation.prompts: 'the old bridge' has \d+ tokens, the model takes 3"):
        encode_prompts(encoder, None, ["the old bridge"], 3)


def test_prompts_are_encoded_with_the_template_of_training(encoder) -> None:
    templates = registry.names("fireflyds.data.templates")
    assert "firefly" in templates
    prompts = encode_prompts(encoder, "firefly", ["青岭镇的特产是什么？"], None)
    dialogue = Sample(messages=(Message("user", "青岭镇的特产是什么？"), Message("assistant", "蜂蜜。")))
    example: Example = encode_sample(encoder, find_template(encoder, "firefly"), dialogue)
    assert prompts.ids[0] == example.input_ids[: example.spans[0][0]].tolist()
    assert encoder.eos_id in prompts.stops


def test_samples_are_recorded_by_step_and_truncated_at_a_resume(tmp_path: Path, make_validator, encoder) -> None:
    engine, logger = Engine(), RecordingLogger()
    validator = make_validator("validation.prompts=['the old bridge','青岭镇']", "validation.max_new_tokens=4")
    validator.begin(engine, logger, 0)
    validator.after(engine, logger, 2)
    rows = read_rows(tmp_path, "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in rows] == [
        (step, text) for step in (0, 2) for text in ("the old bridge", "青岭镇")
    ]
    assert logger.samples[0] == (0, rows[:2])
    assert rows[0]["text"] == rows[2]["text"]
    make_validator("validation.prompts=['the old bridge']").begin(engine, logger, 1)
    assert [row["step"] for row in read_rows(tmp_path, "samples.jsonl")] == [0, 0]


def test_invalid_settings_are_refused_when_the_validator_is_opened(tmp_path: Path, make_validator, encoder) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"validation.guard=code: .* holds no document of that domain, so nothing would ever stop the run. It "
            r"has: en, zh"
        ),
    ):
        make_validator("validation.guard=code", "validation.stop=true")
    with pytest.raises(UserError, match=r"validation.stop=true: needs validation.store"):
        make_validator("validation.store=''", "validation.stop=true")
    with pytest.raises(UserError, match=r"validation.store=.*nowhere: no token store there"):
        make_validator(f"validation.store={tmp_path}/nowhere")
    manifest = tmp_path / "held" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(encoder.fingerprint(), "other"))
    with pytest.raises(UserError, match=r"validation.store=.*made with another tokenizer"):
        make_validator()
    logger = RecordingLogger()
    manifest.write_text(manifest.read_text().replace('"other"', f'"{encoder.fingerprint()}"'))
    make_validator("validation.guard=code").begin(Engine(), logger, 0)
    assert "validation.guard=code: no held-out domain (en, zh), nothing is guarded" in logger.messages[0]


def test_without_a_store_and_prompts_nothing_is_written(tmp_path: Path, make_validator) -> None:
    engine, logger = Engine(), RecordingLogger()
    validator = make_validator("validation.store=''")
    validator.begin(engine, logger, 0)
    assert validator.after(engine, logger, 2) is None
    assert list((tmp_path / "runs" / "r").iterdir()) == []
