"""Composition of configurations: accepted and refused overrides, messages, and the option reference."""

import dataclasses
import os
import re
import sys
from pathlib import Path

import pytest

from fireflyds import app, config, option_reference, overrides
from fireflyds.errors import UserError

REQUIRED = ["run=x", "model=some/model", "data=some/store", "optim.steps=3"]


def test_overrides_reach_the_typed_config() -> None:
    train_config = app.compose(
        "train", [*REQUIRED, "tuning=qlora", "tuning.r=8", "zero=stage3", "optim.schedule=linear"]
    )
    assert isinstance(train_config, config.TrainConfig)
    assert train_config.model.path == "some/model"
    assert train_config.data.store == "some/store"
    assert (train_config.tuning.method, train_config.tuning.r) == (config.TuningMethod.qlora, 8)
    assert train_config.zero.stage == 3
    assert train_config.optim.schedule is config.Schedule.linear


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ([*REQUIRED, "optim.stepz=3"], "Did you mean optim.steps"),
        ([*REQUIRED, "experiment=demo_ctp"], "demo_cpt"),
        (REQUIRED[1:], "run: is not set; train needs"),
        ([*REQUIRED, "seq_len=abc"], "seq_len"),
        ([*REQUIRED, "seq_len=0"], "seq_len=0: must be at least 2"),
        ([*REQUIRED, "zero.stage=4"], "zero.stage=4: must be 0, 1, 2 or 3"),
        ([*REQUIRED, "zero.offload_param=cpu"], "needs zero.stage=3"),
        (["run=x", "model=nonsense", "data=s/t", "optim.steps=3"], "Known: "),
        (REQUIRED[:3], "optim.steps: is unset and so is optim.epochs"),
        ([*REQUIRED, "tuning=qlora", "tuning.r=0"], "tuning.r=0"),
        ([*REQUIRED, "checkpoint.keep_every=0"], "checkpoint.keep_every=0: must be at least 1"),
        ([*REQUIRED, "recovery.rollback_above=1"], "recovery.rollback_above=1.0: must be greater than 1"),
        ([*REQUIRED, "optim.lr=nan"], "optim.lr=nan: must be greater than 0"),
        ([*REQUIRED, "optim.head.lr=-1"], "optim.head.lr=-1.0: must be a number of at least 0"),
        ([*REQUIRED, "hardware.hysteresis=0"], "hardware.hysteresis=0: must be at least 1"),
        ([*REQUIRED, "optim.eps=-1"], "optim.eps=-1.0: must be greater than 0"),
        ([*REQUIRED, "optim.warmup_steps=-5"], "optim.warmup_steps=-5: must be a number of at least 0"),
        ([*REQUIRED, "optim.betas=[0.9]"], "two numbers in [0, 1)"),
        ([*REQUIRED, "hardware.initial_scale_power=-3"], "hardware.initial_scale_power=-3: must be from 0 to 32"),
        ([*REQUIRED, "init_from=x"], "init_from=x: is the run itself"),
    ],
)
def test_errors_name_invalid_input_with_a_remedy(words: list[str], expected: str) -> None:
    with pytest.raises(UserError) as exception:
        app.compose("train", words)
    assert expected in str(exception.value)


def test_texts_is_an_unknown_key_for_verbs_without_texts() -> None:
    for verb, words in (
        ("train", REQUIRED),
        ("prepare", ["data=a/b", "tokenizer=t"]),
        ("chat", ["model=x"]),
        ("doctor", []),
    ):
        with pytest.raises(UserError, match=rf"texts(\.zh)?: no such key for {verb}"):
            app.compose(verb, [*words, "texts.zh=a.jsonl"])


def test_paths_with_spaces_and_chinese_are_accepted_unquoted() -> None:
    prepare_config = app.compose("prepare", ["data=我的 语料/*.txt", "tokenizer=a b/t.model", "out=结果"])
    assert [source.path for source in prepare_config.data.sources] == ["我的 语料/*.txt"]
    assert prepare_config.tokenizer == "a b/t.model"
    assert prepare_config.out == "结果"


def test_chinese_stands_in_lists_maps_and_keys() -> None:
    train_config = app.compose(
        "train",
        [*REQUIRED, "tracking=wandb", "tracking.tags=[中文,a b]", "data.weights.网页=0.5", "data.max_epochs={对话: 2}"],
    )
    assert train_config.tracking.tags == ["中文", "a b"]
    assert train_config.data.weights == {"网页": 0.5}
    assert train_config.data.max_epochs == {"对话": 2.0}
    assert app.compose("train", [*REQUIRED, "data.weights={web: 0.5, 书.v2: 1}"]).data.weights == {
        "web": 0.5,
        "书.v2": 1,
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [("all-linear", ["all-linear"]), ("q_proj,v_proj", ["q_proj", "v_proj"]), ("[a,b]", ["a", "b"])],
)
def test_a_list_needs_no_brackets(value: str, expected: list[str]) -> None:
    lora_config = app.compose("train", [*REQUIRED, "tuning=lora", f"tuning.target_modules={value}"])
    assert lora_config.tuning.target_modules == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([*REQUIRED, "learning_rate=1e-4"], "Here it is optim.lr. "),
        ([*REQUIRED, "cutoff_len=512"], "Here it is seq_len. "),
        ([*REQUIRED, "qwen3"], 'qwen3: is not key=value. Quote a value that contains spaces, as in "key=qwen3'),
        ([*REQUIRED, "seq_len"], "seq_len: is not key=value. Give seq_len=<value>"),
        ([*REQUIRED, "data.weights={网页: [1"], "cannot be read"),
        ([*REQUIRED, "data.weights.网页=viel"], "data.weights"),
        ([*REQUIRED, "没有=1"], "没有: no such key for train"),
    ],
)
def test_a_word_that_cannot_be_read_is_answered_with_what_to_type(words: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        app.compose("train", words)
    assert message in str(refused.value)
    assert "mismatched" not in str(refused.value)
    assert "token recognition" not in str(refused.value)


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("-m", "Use python launch/sweep.py"),
        ("--per_device_train_batch_size", "Here it is micro_batch_size"),
        ("--seq_len=512", "Write seq_len=<value>"),
        ("--nonsense", "Keys are written key=value"),
    ],
)
def test_a_flag_is_answered_with_the_key(flag: str, message: str) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        overrides.refuse_flags("train", [flag])


def test_every_other_name_leads_to_keys_that_exist() -> None:
    known = {row.key for verb in config.VERBS.values() for row in option_reference.rows(verb.config)}
    groups = {path.name for path in app.CONF.iterdir() if path.is_dir()}
    for name, ours in overrides.OTHER_NAMES.items():
        key = re.split("[=, ]", ours)[0]
        assert key in known | groups | {"nothing:", "the"}, name


def test_options_are_files_by_path_or_in_a_folder_of_ones_own(tmp_path: Path) -> None:
    (tmp_path / "mix.yaml").write_text("sources: [{path: 语料/*.txt, domain: web}]\nweights: {web: 1.0}\n")
    prepare_config = app.compose("prepare", [f"data={tmp_path}/mix.yaml", "tokenizer=t", "out=o"])
    assert [source.path for source in prepare_config.data.sources] == ["语料/*.txt"]
    (tmp_path / "own" / "tuning").mkdir(parents=True)
    (tmp_path / "own" / "tuning" / "small.yaml").write_text("defaults: [lora]\nr: 4\n")
    train_config = app.compose("train", [*REQUIRED, "tuning=small"], str(tmp_path / "own"))
    assert train_config.tuning.r == 4
    (tmp_path / "mine.yaml").write_text("# @package _global_\nseq_len: 77\n")
    assert app.compose("train", [*REQUIRED, f"experiment={tmp_path}/mine.yaml"]).seq_len == 77
    with pytest.raises(UserError, match="--config-dir"):
        app.compose("train", REQUIRED, str(tmp_path / "none"))
    (tmp_path / "bad.yaml").write_text("quellen: []\n")
    with pytest.raises(UserError, match="no such key"):
        app.compose("prepare", [f"data={tmp_path}/bad.yaml", "tokenizer=t", "out=o"])


def test_model_is_plain_text_for_verbs_without_a_model_group() -> None:
    assert app.compose("chat", ["model=some/dir", "prompt=你好，世界？"]).prompt == "你好，世界？"
    assert app.compose("evaluate", ["model=x/y", "bits_per_byte.texts.zh=a.txt"]).bits_per_byte.texts == {"zh": "a.txt"}


@pytest.mark.parametrize(
    "spelling", [["--local_rank=1"], ["--local-rank", "1"], ["--local_rank", "1"], ["--local-rank=1"]]
)
def test_local_rank_is_dropped_in_any_spelling(spelling: list[str]) -> None:
    assert overrides.drop_local_rank(["a=1", *spelling, "b=2"]) == ["a=1", "b=2"]


def test_a_composed_config_round_trips_through_yaml(tmp_path: Path) -> None:
    train_config = app.compose(
        "train", [*REQUIRED, "tuning=lora", "data.weights.zh=0.5", "zero.extra.wall_clock_breakdown=true"]
    )
    file = tmp_path / "config.yaml"
    file.write_text(app.to_yaml(train_config), encoding="utf-8")
    assert app.from_yaml(file, config.TrainConfig) == train_config


def test_a_model_without_a_directory_is_refused() -> None:
    train_config = app.compose("train", ["run=x", "model=llama2_7b", "data=some/store", "optim.steps=3"])
    with pytest.raises(UserError, match="model.path: is empty"):
        assert train_config.model.tokenizer_path


def test_zero_accepts_a_bare_stage_number() -> None:
    assert [app.compose("train", [*REQUIRED, f"zero={stage}"]).zero.stage for stage in range(4)] == [0, 1, 2, 3]


def test_every_shipped_configuration_composes() -> None:
    experiments = [path.stem for path in (app.CONF / "experiment").glob("*.yaml")]
    assert "demo_cpt" in experiments
    for name in experiments:
        words = [] if name.startswith("demo") else ["run=x", "data=some/store", "model.path=some/model"]
        assert app.compose("train", [f"experiment={name}", *words]).run
        assert app.compose("plan", [f"experiment={name}"]).optim.lr > 0
    for group in ("tuning", "optim", "hardware", "zero"):
        for path in (app.CONF / group).glob("*.yaml"):
            extra = ["tuning.embeddings=all"] if path.stem == "freeze" else []
            assert app.compose("train", [*REQUIRED, f"{group}={path.stem}", *extra])
    for path in (app.CONF / "road").glob("*.yaml"):
        for stage in app.compose("demo", [f"road={path.stem}"]).road.stages:
            assert stage.verb in config.VERBS
            app.compose(stage.verb, list(stage.overrides))


def test_every_attribute_of_the_schema_is_a_documented_field() -> None:
    for schema in vars(config).values():
        if dataclasses.is_dataclass(schema) and isinstance(schema, type):
            names = {field.name for field in dataclasses.fields(schema)}
            assert names == {name for base in schema.__mro__[:-1] for name in base.__annotations__}
    for schema in (verb.config for verb in config.VERBS.values()):
        for row in option_reference.rows(schema):
            assert row.meaning, row.key


def test_the_option_reference_file_is_up_to_date() -> None:
    assert (app.CONF / "README.md").read_text(encoding="utf-8") == option_reference.markdown(app.CONF)


def _parse_rows(text: str) -> list[tuple[str, ...]]:
    """Key, type, default and meaning of every row of the tables, without Markdown."""
    lines = [line for line in text.splitlines() if line.startswith("| `")]
    cells = [[cell.replace("\\|", "|") for cell in line[2:-2].split(" | ", 3)] for line in lines]
    return [(*(cell.replace("`", "") for cell in line[:3]), line[3]) for line in cells]


def test_option_reference_shows_every_key_of_every_verb_once() -> None:
    text = option_reference.markdown(app.CONF)
    expected = {tuple(row) for verb in config.VERBS.values() for row in option_reference.rows(verb.config)}
    assert sorted(_parse_rows(text)) == sorted(expected)
    assert len(expected) > 200
    assert "| `init` | `mean` \\| `weighted` \\| `random` \\| `omp` | `mean` | " in text
    assert "| `data.sources[].path` | `str` | `required` | " in text
    for verb, record in config.VERBS.items():
        block = re.split(r"\n##", text.partition(f"\n### Verb `{verb}`\n")[2])[0]
        documented_keys = {key for key, *_ in _parse_rows(block)}
        for line in re.findall(r"^(?:Sections:|As in .*?\):) (.*)", block, re.MULTILINE):
            documented_keys |= set(re.findall(r"`(.+?)`", line))
        sections = option_reference.sections(record.config)
        keys = {row.key for row in option_reference.rows(record.config)}
        assert documented_keys == {key.partition(".")[0] if key.partition(".")[0] in sections else key for key in keys}


def test_help_names_the_type_and_the_default() -> None:
    help_text = option_reference.help_text("expand", "About.", app.CONF)
    assert re.search(r"^  init  +.* \[mean \| weighted \| random \| omp; mean\]$", help_text, re.MULTILINE)
    assert re.search(r"^  base  +.* \[str; required\]$", help_text, re.MULTILINE)


@dataclasses.dataclass(kw_only=True)
class _Section:
    size: int = 1
    """Size."""
    rule: config.RowInit | None = None
    """Rule."""


@dataclasses.dataclass(kw_only=True)
class _OtherSection(_Section):
    size: int = 2


@dataclasses.dataclass(kw_only=True)
class _ConfigOfTrain:
    part: _Section = dataclasses.field(default_factory=_Section)


@dataclasses.dataclass(kw_only=True)
class _ConfigOfPlan:
    part: _OtherSection = dataclasses.field(default_factory=_OtherSection)


def test_option_reference_distinguishes_sections_of_the_same_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "VERBS", {"train": config.Verb(_ConfigOfTrain), "plan": config.Verb(_ConfigOfPlan)})
    text = option_reference.markdown(app.CONF)
    first, second = text.split("### Section `part` of ")[1:]
    assert first.startswith("`train`\n")
    assert [row[:3] for row in _parse_rows(first)] == [
        ("part.size", "int", "1"),
        ("part.rule", "mean | weighted | random | omp | null", "null"),
    ]
    assert second.startswith("`plan`\n")
    assert _parse_rows(second) == [("part.size", "int", "2", "Size.")]
    assert "As in [section `part` of `train`](#section-part-of-train): `part.rule`." in second
    assert "Sections: [`part`](#section-part-of-plan)." in text


def test_help_and_cfg_job_do_not_import_torch(verb) -> None:
    for name in config.VERBS:
        completed = verb(name, "-h", env={"PYTHONPROFILEIMPORTTIME": "1"})
        assert "Keys" in completed.stdout
        assert "import time:" in completed.stderr
        assert "| torch\n" not in completed.stderr
    assert "seq_len: 7" in verb("train", *REQUIRED, "seq_len=7", "--cfg", "job").stdout


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({"PYTORCH_CUDA_ALLOC_CONF": "max_split_size_mb:64"}, "max_split_size_mb:64"),
        ({"PYTORCH_ALLOC_CONF": "garbage_collection_threshold:0.8"}, None),
    ],
)
def test_gpu_memory_grows_in_segments_unless_the_user_says_how(monkeypatch, given: dict[str, str], expected) -> None:
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        monkeypatch.setenv(name, "")  # so that it is restored
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["plan.py", "--help"])
    app.main(lambda config: None, "About.")
    assert os.environ.get("PYTORCH_CUDA_ALLOC_CONF") == expected


def test_an_implementation_of_packed_attention_is_refused_where_nothing_is_packed() -> None:
    keys = ["run=x", "model=a/b", "data=c/d", "optim.steps=3", "packing=off"]
    assert app.compose("train", keys).packing is False
    with pytest.raises(UserError, match="hardware.attention=plain: packing=false runs transformers' own attention"):
        app.compose("train", [*keys, "hardware.attention=plain"])
