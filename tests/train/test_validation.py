"""Held-out domains measured as one would by hand, the guard, samples, and nothing of training touched."""

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
def _alone(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/ranks", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Engine:
    """As much of an engine as validation uses."""

    device = torch.device("cpu")

    def __init__(self, **changes) -> None:
        self.module = fuse(tiny_model("llama", vocab_size=400, num_key_value_heads=2, **changes))


class Journal:
    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.samples: list[tuple] = []
        self.lines: list[str] = []
        self.log = logging.Logger("validation")
        self.log.addHandler(handler := logging.Handler())
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]

    def log_validation(self, row) -> None:
        self.rows.append(row)

    def log_samples(self, step, samples) -> None:
        self.samples.append((step, samples))


@pytest.fixture
def validator(tmp_path: Path, encoder, base_tokenizer: Path):
    """Makes a validator of two held-out domains; what is trained on are documents, or dialogues of a template."""
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


def lines_of(tmp_path: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (tmp_path / "runs" / "r" / name).read_text().splitlines()]


@pytest.mark.parametrize("rows", [1, 3])
def test_bits_per_byte_are_those_of_documents_one_by_one(tmp_path: Path, validator, encoder, rows: int) -> None:
    engine, journal = Engine(), Journal()
    validator(f"micro_batch_size={rows}", f"global_batch_size={rows}").begin(engine, journal, 0)
    found = journal.rows[0]
    table, plain = encoder.token_bytes(), tiny_model("llama", vocab_size=400, num_key_value_heads=2)
    for domain, texts in (("en", EN), ("zh", ZH)):
        ids = [torch.from_numpy(encode_document(encoder, text).input_ids.astype(np.int64)) for text in texts]
        nats = float(loss_of_documents(plain, ids))
        tokens, num_bytes = sum(len(each) - 1 for each in ids), sum(table[each[1:]].sum() for each in ids)
        # A space is put before every text.
        assert num_bytes == sum(len(text.encode()) + 1 for text in texts)
        assert found[f"validation/loss/{domain}"] == pytest.approx(nats / tokens, rel=1e-5)
        assert found[f"validation/bits_per_byte/{domain}"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)
    assert lines_of(tmp_path, "validation.jsonl")[0]["validation/loss/en"] == found["validation/loss/en"]


def _worse(model) -> None:
    """Make a model that knows nothing sure of it."""
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(100)


def test_the_guard_compares_with_the_start_across_a_resume(tmp_path: Path, validator, encoder) -> None:
    engine, journal = Engine(), Journal()
    first = validator("validation.max_rise=0.1")
    first.begin(engine, journal, 0)
    assert first.after(engine, journal, 1) is None
    assert first.after(engine, journal, 2) is None
    assert [row["step"] for row in journal.rows] == [0, 2]
    assert not [line for line in journal.lines if "warning" in line]
    _worse(engine.module)
    # Warned of, and gone on.
    assert first.after(engine, journal, 4) is None
    start, risen = (journal.rows[place]["validation/bits_per_byte/en"] for place in (0, 2))
    assert risen > 1.1 * start
    message = (
        f"step 4: validation.guard=en: rose to {risen:.4f} bits per byte, "
        f"{100 * (risen / start - 1):.1f} % above its {start:.4f} at step 0"
    )
    assert f"warning: {message}" in journal.lines[-1]
    # Resumed at step 3: what came after is cut, the start stays.
    again, journal = validator("validation.max_rise=0.1", "validation.stop=true"), Journal()
    again.begin(engine, journal, 3)
    assert journal.rows == []
    assert [row["step"] for row in lines_of(tmp_path, "validation.jsonl")] == [0, 2]
    assert message in str(again.after(engine, journal, 4))
    assert [row["step"] for row in lines_of(tmp_path, "validation.jsonl")] == [0, 2, 4]


def test_what_a_stopped_run_could_not_measure_is_measured_when_it_goes_on(tmp_path: Path, validator) -> None:
    engine, journal = Engine(), Journal()
    validator().begin(engine, journal, 0)
    validator().begin(engine, journal, 4)
    assert [row["step"] for row in lines_of(tmp_path, "validation.jsonl")] == [0, 4]
    validator().begin(engine, journal, 4)
    validator().begin(engine, journal, 5)
    assert [row["step"] for row in lines_of(tmp_path, "validation.jsonl")] == [0, 4]
    # Other held-out rows have a start of their own.
    validator("validation.rows=1", "seq_len=16").begin(engine, journal, 5)
    assert [row["step"] for row in lines_of(tmp_path, "validation.jsonl")] == [0, 4, 5]


def test_a_loss_that_is_no_number_is_a_rise(tmp_path: Path, validator) -> None:
    engine, journal = Engine(), Journal()
    found = validator("validation.stop=true")
    found.begin(engine, journal, 0)
    with torch.no_grad():
        engine.module.model.norm.weight.fill_(float("nan"))
    assert "en: rose to nan" in str(found.after(engine, journal, 2))
    assert lines_of(tmp_path, "validation.jsonl")[1]["validation/loss/en"] is None
    assert found.newest["validation/loss/en"] is None


def test_what_is_no_number_is_no_start(tmp_path: Path, validator) -> None:
    engine, journal = Engine(), Journal()
    found = validator("validation.stop=true", "validation.max_rise=0.1")
    weight = engine.module.model.norm.weight.detach().clone()
    with torch.no_grad():
        engine.module.model.norm.weight.fill_(float("nan"))
    error = found.begin(engine, journal, 0)
    assert error is not None
    assert error.finding == "step 0: validation.guard=en: nan bits per byte is not a valid baseline"
    assert error.remedy.startswith("Give another model=")
    with torch.no_grad():
        engine.module.model.norm.weight.copy_(weight)
    assert found.after(engine, journal, 2) is None
    _worse(engine.module)
    assert "at step 2; validation.max_rise" in str(found.after(engine, journal, 4))


def test_a_resumed_run_is_stopped_by_what_it_could_not_measure_before(tmp_path: Path, validator) -> None:
    engine, journal = Engine(), Journal()
    assert validator("validation.stop=true").begin(engine, journal, 0) is None
    _worse(engine.module)
    error = validator("validation.stop=true").begin(engine, journal, 4)
    assert "step 4: validation.guard=en: rose to" in str(error)
    (tmp_path / "runs" / "r" / "validation.jsonl").write_text("")
    assert validator().begin(engine, journal, 4) is None


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "validation.guard=en: no held-out domain (zh), nothing is guarded"),
        (
            [[5]],
            "warning: step 0: validation.guard=en: cannot be measured, none of its held-out documents has a token to "
            "learn. Give held-out documents of two tokens or more",
        ),
    ],
)
def test_a_guarded_domain_of_which_nothing_can_be_measured_is_told(
    tmp_path: Path, validator, encoder, ids, words
) -> None:
    shutil.rmtree(tmp_path / "held")
    en = [Example(np.array(each), ((0, 1),), 1, is_document=True) for each in ids]
    store = write_store(tmp_path / "held", {"en": en, "zh": [encode_document(encoder, ZH[0])]}, 400)
    assert store.domains == ["en", "zh"]
    manifest = tmp_path / "held" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tokenizer": "x"', f'"tokenizer": "{encoder.fingerprint()}"'))
    journal = Journal()
    assert validator().begin(Engine(), journal, 0) is None
    assert words in journal.lines
    if not ids:
        with pytest.raises(UserError, match=r"holds no document of that domain, .* It has: zh"):
            validator("validation.stop=true")


def _draw(*_) -> None:
    torch.rand(3)
    random.random()
    np.random.rand(2)


def test_random_states_and_modes_are_put_back(validator) -> None:
    engine, journal = Engine(attention_dropout=0.0), Journal()
    model = engine.module.train()
    model.model.layers[0].eval()
    eight_bit = Linear8bitLt(4, 4, has_fp16_weights=False)
    eight_bit.weight = torch.nn.Parameter(torch.zeros(4, 4, dtype=torch.int8), requires_grad=False)
    model.eight_bit = eight_bit
    seen: list[bool] = []
    model.model.norm.register_forward_hook(lambda *_: seen.append((model.training, eight_bit.training)))
    model.model.norm.register_forward_hook(_draw)
    modes = [module.training for module in model.modules()]
    found = validator("validation.prompts=[a]", "validation.max_new_tokens=3")
    random.seed(1)
    np.random.seed(2)
    torch.manual_seed(3)
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()
    found.begin(engine, journal, 0)
    assert seen
    assert set(seen) == {(False, True)}
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert all(np.array_equal(a, b) for a, b in zip(np.random.get_state(), before[2], strict=True))
    assert not any(parameter.grad is not None for parameter in model.parameters())
    with pytest.raises(ZeroDivisionError), evaluation_mode(model, torch.device("cpu")):
        1 / 0  # noqa: B018
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize("family", ["llama", "bloom", "falcon"])
def test_samples_are_the_likeliest_tokens(encoder, family: str) -> None:
    changes = {"num_key_value_heads": 2} if family == "llama" else {}
    plain, ours = (tiny_model(family, vocab_size=400, **changes).eval() for _ in range(2))
    prompts = encode_prompts(encoder, None, ["the old bridge", "a", "青岭镇"], None)
    assert prompts.ids[1] == [encoder.bos_id, *encoder.encode("a")]
    found = greedy_generate(fuse(ours), prompts, 6, None, torch.device("cpu"))
    for ids, written in zip(prompts.ids, found, strict=True):
        wanted = list(ids)
        for _ in range(6):
            with torch.no_grad():
                wanted.append(int(plain(torch.tensor([wanted])).logits[0, -1].argmax()))
        new = wanted[len(ids) :]
        assert written == (new[: new.index(encoder.eos_id)] if encoder.eos_id in new else new)
    assert any(found)


def test_an_answer_ends_at_its_stop_and_at_the_model_s_room(encoder) -> None:
    model = fuse(tiny_model("llama", vocab_size=400, num_key_value_heads=2).eval())
    prompts = encode_prompts(encoder, None, ["the old bridge", "a"], None)
    free = greedy_generate(model, prompts, 8, None, torch.device("cpu"))
    room = len(prompts.ids[0]) + 3
    assert len(greedy_generate(model, prompts, 8, room, torch.device("cpu"))[0]) == 3
    stop = frozenset({free[0][2]})
    first = free[0].index(free[0][2])
    stopped = greedy_generate(model, type(prompts)(prompts.texts, prompts.ids, stop), 8, None, torch.device("cpu"))
    assert stopped[0] == free[0][:first]
    with pytest.raises(UserError, match=r"validation.prompts: 'the old bridge' has \d+ tokens, the model takes 3"):
        encode_prompts(encoder, None, ["the old bridge"], 3)


def test_a_question_is_asked_as_training_saw_questions(encoder) -> None:
    templates = registry.names("fireflyds.data.templates")
    assert "firefly" in templates
    asked = encode_prompts(encoder, "firefly", ["青岭镇的特产是什么？"], None)
    dialogue = Sample(messages=(Message("user", "青岭镇的特产是什么？"), Message("assistant", "蜂蜜。")))
    example: Example = encode_sample(encoder, "firefly", dialogue)
    assert asked.ids[0] == example.input_ids[: example.spans[0][0]].tolist()
    assert encoder.eos_id in asked.stops


def test_samples_are_kept_by_step_and_cut_back(tmp_path: Path, validator, encoder) -> None:
    engine, journal = Engine(), Journal()
    found = validator("validation.prompts=['the old bridge','青岭镇']", "validation.max_new_tokens=4")
    found.begin(engine, journal, 0)
    found.after(engine, journal, 2)
    kept = lines_of(tmp_path, "samples.jsonl")
    assert [(row["step"], row["prompt"]) for row in kept] == [
        (step, text) for step in (0, 2) for text in ("the old bridge", "青岭镇")
    ]
    assert journal.samples[0] == (0, kept[:2])
    assert kept[0]["text"] == kept[2]["text"]
    validator("validation.prompts=['the old bridge']").begin(engine, journal, 1)
    assert [row["step"] for row in lines_of(tmp_path, "samples.jsonl")] == [0, 0]


def test_wrong_settings_are_named_before_anything_heavy(tmp_path: Path, validator, encoder) -> None:
    with pytest.raises(
        UserError,
        match=(
            r"validation.guard=code: .* holds no document of that domain, so nothing would ever stop the run. It "
            r"has: en, zh"
        ),
    ):
        validator("validation.guard=code", "validation.stop=true")
    with pytest.raises(UserError, match=r"validation.stop=true: needs validation.store"):
        validator("validation.store=''", "validation.stop=true")
    with pytest.raises(UserError, match=r"validation.store=.*nowhere: no token store there"):
        validator(f"validation.store={tmp_path}/nowhere")
    manifest = tmp_path / "held" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(encoder.fingerprint(), "other"))
    with pytest.raises(UserError, match=r"validation.store=.*made with another tokenizer"):
        validator()
    journal = Journal()
    manifest.write_text(manifest.read_text().replace('"other"', f'"{encoder.fingerprint()}"'))
    validator("validation.guard=code").begin(Engine(), journal, 0)
    assert "validation.guard=code: no held-out domain (en, zh), nothing is guarded" in journal.lines[0]


def test_without_a_store_and_prompts_nothing_is_written(tmp_path: Path, validator) -> None:
    engine, journal = Engine(), Journal()
    found = validator("validation.store=''")
    found.begin(engine, journal, 0)
    assert found.after(engine, journal, 2) is None
    assert list((tmp_path / "runs" / "r").iterdir()) == []
