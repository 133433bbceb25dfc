"""A tiny run on one CPU rank is profiled: recorded steps, output files, and runs that end early."""

import gzip
import json
import logging
import re
from pathlib import Path

import pytest
from samples import CHINESE
from tiny_run import prepare_store, tiny_keys

from fireflyds import app
from fireflyds.config import ProfileConfig
from fireflyds.errors import UserError
from fireflyds.metrics.profiler import StepProfiler
from fireflyds.runs.config_diff import diff_configs

REQUIRED = ["run=x", "model=some/model", "data=some/store", "optim.steps=3"]


def step_annotations(file: Path) -> list[str]:
    """The names of steps and of their parts in the trace, by time."""
    trace = json.loads(gzip.decompress(file.read_bytes()))
    spans = [event for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    profile_files = [event["name"] for event in sorted(spans, key=lambda event: event["ts"])]
    return [name for name in profile_files if re.fullmatch(r"ProfilerStep#\d+|data|forward|backward|optimizer", name)]


def profile_files(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "profile").iterdir())


@pytest.fixture
def arguments(verb, tmp_path: Path, base_tokenizer: Path) -> list[str]:
    prepare_store(verb, tmp_path, base_tokenizer, CHINESE)
    return [
        *tiny_keys(base_tokenizer, layers=1),
        "seq_len=128",
        "global_batch_size=2",
        "optim.schedule=constant",
        "checkpoint.background=false",
    ]


def test_a_run_records_exactly_the_configured_steps(verb, arguments: list[str], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "on"
    shown = verb("train", "run=on", *arguments, "optim.steps=1", "profile.start=5").stderr
    assert "profile.start=5: the run has 1 steps, so none is recorded" in shown
    assert not (run / "profile").exists()
    # Numbers are those of the run, also after a resume, and what is beyond its end is left out.
    shown = verb(
        "train", "run=on", *arguments, "optim.steps=3", "profile.start=2", "profile.steps=9", "profile.memory=true"
    )
    assert profile_files(run) == ["rank-0.steps-2-3.trace.json.gz", "rank-0.steps-2-3.txt"]
    assert shown.stderr.count("profile of steps 2 to 3 on rank 0: ") == 1
    phases = ["data", "forward", "backward", "forward", "backward", "optimizer"]
    assert step_annotations(run / "profile" / "rank-0.steps-2-3.trace.json.gz") == [
        "ProfilerStep#2",
        *phases,
        "ProfilerStep#3",
        *phases,
    ]
    table = (run / "profile" / "rank-0.steps-2-3.txt").read_text()
    assert "aten::mm" in table
    assert "Self CPU" in table


def test_a_rank_beyond_the_world_size_is_refused() -> None:
    ProfileConfig(start=1, ranks=[0, 1]).check_world_size(2)
    with pytest.raises(
        UserError, match=r"profile\.ranks=\[0, 1\]: this start has ranks 0 to 0\. Give ranks among them"
    ):
        ProfileConfig(start=1, ranks=[0, 1]).check_world_size(1)


def steps_failing_at(number: int):
    for step in range(1, 10):
        if step == number:
            raise RuntimeError("lost")
        yield step


def record(tmp_path: Path, step_iterator, *, trained: int = 0, leave_at: int = 0, **options) -> list[str]:
    """Profiles an iterator of steps, and returns the log lines."""
    log_lines: list[str] = []
    logger = logging.Logger("profile")
    logger.addHandler(handler := logging.Handler())
    handler.emit = lambda record: log_lines.append(record.getMessage())  # type: ignore[method-assign]
    with StepProfiler(ProfileConfig(**options), tmp_path, 0, logger) as profiler:
        for step in profiler.follow(step_iterator, trained, 9):
            if step == leave_at:
                break
    return log_lines


def test_a_run_that_ends_early_writes_the_recorded_steps(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="lost"):
        record(tmp_path / "failed", steps_failing_at(4), start=3, steps=5)
    assert profile_files(tmp_path / "failed") == ["rank-0.steps-3-4.trace.json.gz", "rank-0.steps-3-4.txt"]
    assert step_annotations(tmp_path / "failed" / "profile" / "rank-0.steps-3-4.trace.json.gz") == [
        "ProfilerStep#3",
        "ProfilerStep#4",
    ]
    record(tmp_path / "stopped", iter(range(1, 10)), leave_at=2, start=1, steps=5)
    assert profile_files(tmp_path / "stopped") == ["rank-0.steps-1-2.trace.json.gz", "rank-0.steps-1-2.txt"]
    record(tmp_path / "resumed", iter(range(8, 10)), trained=7, start=6, steps=3, stacks=True)
    assert profile_files(tmp_path / "resumed") == ["rank-0.steps-8-8.trace.json.gz", "rank-0.steps-8-8.txt"]


def test_other_ranks_and_past_steps_record_nothing(tmp_path: Path) -> None:
    assert record(tmp_path, iter(range(1, 10)), start=1, ranks=[1]) == []
    assert record(tmp_path, iter(range(5, 10)), trained=4, start=1, steps=4) == []
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_gives_one_warning(tmp_path: Path) -> None:
    (tmp_path / "profile").write_text("in the way")
    log_lines = record(tmp_path, iter(range(1, 10)), start=1, steps=2)
    assert len(log_lines) == 1
    assert log_lines[0].startswith("profile of rank 0: was not written (")


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["profile.start=-1"], "profile.start=-1: must be at least 0"),
        (["profile.steps=0"], "profile.steps=0: must be at least 1"),
        (["profile.start=1", "profile.ranks=[]"], "profile.ranks=[]: names no rank"),
        (["profile.ranks=[0,-1]"], "profile.ranks=[0, -1]: must be numbers of at least 0"),
    ],
)
def test_invalid_values_are_refused(overrides: list[str], expected: str) -> None:
    with pytest.raises(UserError) as exception:
        app.compose("train", [*REQUIRED, *overrides])
    assert expected in str(exception.value)


def test_profile_settings_do_not_change_the_run_configuration() -> None:
    old, new = (app.plain(app.to_yaml(app.compose("train", [*REQUIRED, *more]))) for more in ([], ["profile.start=9"]))
    assert old != new
    assert diff_configs(old, new) == []
    del old["profile"]  # a run of an earlier version
    assert diff_configs(old, new) == []
