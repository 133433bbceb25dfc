"""Invalid input ends a verb early with one message and exit code 2, and earlier output stays unchanged."""

import json
from pathlib import Path

import pytest
from samples import ENGLISH


def assert_refused(completed, *messages: str) -> None:
    assert completed.returncode == 2, completed.stdout + completed.stderr
    assert "Traceback" not in completed.stderr
    assert completed.stderr.count("error: ") == 1
    for message in messages:
        assert message in completed.stderr


@pytest.fixture
def store(verb, tmp_path: Path, base_tokenizer: Path) -> Path:
    (tmp_path / "en.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    verb("prepare", "data=en.txt", f"tokenizer={base_tokenizer}", "out=store", "workers=1")
    return tmp_path / "store"


def test_missing_and_empty_corpora_are_refused(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    (tmp_path / "empty.txt").touch()
    for data, message in (("nowhere.txt", "no such file"), ("empty.txt", "no document could be used")):
        assert_refused(
            verb("prepare", f"data={data}", f"tokenizer={base_tokenizer}", "out=s", check=False), data, message
        )
    assert not (tmp_path / "s").exists()
    assert_refused(verb("learn", "corpus=empty.txt", "out=t", check=False), "no documents in it")
    assert_refused(
        verb("expand", f"base={base_tokenizer}", "corpus=empty.txt", "num_pieces=5", "out=e", check=False),
        "no documents in it",
    )
    assert [path.name for path in tmp_path.iterdir()] == ["empty.txt"]


def test_an_invalid_line_is_rejected_and_reported_at_the_end(verb, tmp_path: Path, base_tokenizer: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n{broken\n{"text": "\xff\xfe"}\n{"text": "also fine"}\n')
    completed = verb("prepare", "data=a.jsonl", f"tokenizer={base_tokenizer}", "out=s", "max_rejected=0.6")
    assert "2 documents" in completed.stdout
    assert "2 rejected" in completed.stdout
    rows = [json.loads(line) for line in (tmp_path / "s" / "rejected.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rows] == [("a.jsonl", 2), ("a.jsonl", 3)]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_failed_prepare_leaves_the_earlier_store_unchanged(
    verb, store: Path, tmp_path: Path, base_tokenizer: Path
) -> None:
    contents_before = contents(store)
    (tmp_path / "bad.jsonl").write_text("{broken\n")
    assert_refused(
        verb("prepare", "data=bad.jsonl", f"tokenizer={base_tokenizer}", "out=store", check=False), "not JSON"
    )
    assert contents(store) == contents_before
    completed = verb("prepare", "data=en.txt", f"tokenizer={base_tokenizer}", "out=store", "workers=1")
    assert "nothing to do" in completed.stdout


def test_a_folder_with_other_files_is_not_overwritten(verb, tmp_path: Path, base_tokenizer: Path, store: Path) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    assert_refused(
        verb("prepare", "data=en.txt", f"tokenizer={base_tokenizer}", "out=mine", check=False), "holds other things"
    )
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years of work"


def test_training_refuses_invalid_arguments(verb, store: Path, tmp_path: Path, base_tokenizer: Path) -> None:
    scratch = [
        "run=r",
        "model=at_path",
        "model.init=scratch",
        f"model.tokenizer={base_tokenizer}",
        "optim.steps=2",
        "seq_len=64",
        (
            "model.architecture={model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
            "num_attention_heads: 2}"
        ),
    ]
    assert_refused(
        verb("train", *scratch, "data=store", "global_batch_size=3", "micro_batch_size=2", check=False),
        "global_batch_size=3",
        "Nearest: 2",
    )
    assert_refused(
        verb("train", *scratch, "data=store", "seq_len=4096", check=False), "seq_len=4096: the model has 2048 positions"
    )
    assert_refused(verb("train", *scratch, "data=nowhere/", check=False), "no token store there", "launch/prepare.py")
    assert_refused(verb("train", *scratch, "data=store", "data.weights.zh=1", check=False), "It has: text")
    assert_refused(
        verb("train", "run=r", "model=nowhere/", "data=store", "optim.steps=1", check=False),
        "nowhere",
        "no such file or directory",
    )
    assert not (tmp_path / "runs").exists()


def test_a_store_made_with_another_tokenizer_is_refused(verb, store: Path, tmp_path: Path) -> None:
    verb("learn", "corpus=en.txt", "out=other", "vocab_size=350")
    scratch = [
        "model=at_path",
        "model.init=scratch",
        "model.tokenizer=other",
        "model.architecture={model_type: llama}",
    ]
    completed = verb("train", "run=r", *scratch, "data=store", "optim.steps=1", check=False)
    assert_refused(completed, "made with another tokenizer", "Prepare it again with tokenizer=other")
    assert not (tmp_path / "runs").exists()


def test_export_evaluate_and_chat_refuse_missing_inputs(verb, tmp_path: Path) -> None:
    assert_refused(verb("export", "run=never", check=False), "run=never: no such run", "Known: none")
    assert_refused(verb("evaluate", "model=never", check=False), "no config.json there")
    assert_refused(
        verb("evaluate", "model=never", "tasks=[guess]", check=False),
        "tasks=guess: no such entry. Known: bits_per_byte, cmmlu, multiple_choice",
    )
    assert_refused(verb("chat", "model=never", check=False), "no config.json there")


@pytest.mark.slow
def test_a_refusal_on_two_ranks_is_one_message(verb, store: Path, base_tokenizer: Path, tmp_path: Path) -> None:
    arguments = [
        "run=r",
        "data=store",
        "model=at_path",
        "model.init=scratch",
        f"model.tokenizer={base_tokenizer}",
        "optim.steps=1",
        "seq_len=64",
        "global_batch_size=2",
        (
            "model.architecture={model_type: llama, hidden_size: 16, intermediate_size: 32, num_hidden_layers: 1, "
            "num_attention_heads: 2}"
        ),
    ]
    start = ("deepspeed", "--num_gpus", "2")
    verb("train", *arguments, start=start)
    completed = verb("train", *arguments, "optim.lr=0.5", start=start, check=False)
    assert completed.returncode == 2
    assert "Traceback" not in completed.stderr
    assert completed.stderr.count("error: ") == 1
    assert "optim.lr: 0.0002 -> 0.5" in completed.stderr


def test_values_out_of_range_are_refused(verb, tmp_path: Path) -> None:
    for name, arguments, message in (
        ("evaluate", ["model=x", "max_tokens=0"], "max_tokens=0: must be at least 2"),
        ("evaluate", ["model=x", "tasks=[]"], "nothing to do"),
        ("prepare", ["data=x/y", "tokenizer=t", "workers=-1"], "workers=-1: must be at least 0"),
        ("chat", ["model=x", "max_new_tokens=0"], "max_new_tokens=0: must be at least 1"),
        ("learn", ["corpus=x", "out=y", "vocab_size=5"], "vocab_size=5: must be at least 300"),
        ("expand", ["base=x", "out=y", "corpus=z", "num_pieces=-5"], "num_pieces=-5: must be at least 0"),
        ("train", ["--foo", "run=x"], "--foo: no such option"),
    ):
        assert_refused(verb(name, *arguments, check=False), message)
