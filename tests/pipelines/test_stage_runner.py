"""A road goes on where it stopped, reuses what is whole, and does again what a change touches."""

import sys
from pathlib import Path

import pytest

from fireflyds import app
from fireflyds.config import PipelineConfig, StageConfig
from fireflyds.errors import UserError
from fireflyds.pipelines import stage_runner
from fireflyds.pipelines.stage_runner import PipelineRunner


@pytest.fixture
def walk(tmp_path: Path, monkeypatch):
    """Stages that append their name to a journal, and fail while a file `broken` exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "r").mkdir(parents=True)
    script = (
        "import sys, pathlib as p; out, name = map(p.Path, sys.argv[1:3]); (out / "
        "'journal').open('a').write(f'{name} '); "
    )
    script += (
        "sys.exit(3) if (out / f'broken-{name}').exists() else ((out / name).mkdir(exist_ok=True), (out / name / "
        "'made').touch())"
    )
    monkeypatch.setattr(
        stage_runner,
        "stage_command",
        lambda stage: [sys.executable, "-c", script, str(tmp_path / "runs" / "r"), stage.name, *stage.overrides],
    )

    def run(second: str = "", seed: str = "k") -> str:
        stages = [
            StageConfig(name=name, verb="x", output=f"{name}/made", overrides=[second] if name == "b" else [])
            for name in "abc"
        ]
        before = _journal(tmp_path / "runs" / "r")
        PipelineRunner(PipelineConfig(name="r", stages=stages), seed).run()
        return _journal(tmp_path / "runs" / "r")[len(before) :].strip()

    return run


def _journal(folder: Path) -> str:
    file = folder / "journal"
    return file.read_text() if file.exists() else ""


def test_a_whole_road_is_reused(walk) -> None:
    assert walk() == "a b c"
    assert walk() == ""


def test_a_changed_stage_does_itself_and_the_later_ones_again(walk) -> None:
    walk()
    assert walk(second="other") == "b c"
    assert walk(second="other", seed="new") == "a b c"


def test_a_failed_stage_stops_the_road_and_is_started_again(walk, tmp_path: Path) -> None:
    (tmp_path / "runs" / "r" / "broken-b").touch()
    with pytest.raises(UserError, match=r"b: .* failed with exit code 3"):
        walk()
    (tmp_path / "runs" / "r" / "broken-b").unlink()
    assert walk() == "b c"


def test_what_was_deleted_is_made_again(walk, tmp_path: Path) -> None:
    walk()
    (tmp_path / "runs" / "r" / "b" / "made").unlink()
    assert walk() == "b"


def test_two_walkers_do_not_meet(walk, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "runs" / "r" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process runs this pipeline"):
            walk()


def test_a_folder_that_no_stage_made_is_left_alone(walk, tmp_path: Path) -> None:
    thesis = tmp_path / "runs" / "r" / "a" / "thesis.txt"
    thesis.parent.mkdir()
    thesis.write_text("years of work")
    walk()
    assert thesis.read_text() == "years of work"


def test_what_later_stages_and_people_put_into_an_output_is_no_obstacle(tmp_path: Path, monkeypatch) -> None:
    """Training caches plans in a store, evaluation writes into an export: both are made again, and nothing is lost."""
    monkeypatch.chdir(tmp_path)
    write = (
        "import sys; from pathlib import Path; from fireflyds.fs import Output, atomic_dir\n"
        "with atomic_dir(Path('runs/r/model'), Output('export')) as folder:\n"
        "    (folder / 'weights').write_text(sys.argv[1])\n"
    )
    score = (
        "from pathlib import Path; Path('runs/r/model/eval').mkdir(exist_ok=True)\n"
        "with Path('runs/r/model/eval/scores').open('a') as file: file.write('x')\n"
    )
    scripts = {"export": write, "evaluate": score}
    monkeypatch.setattr(
        stage_runner,
        "stage_command",
        lambda stage: [sys.executable, "-c", scripts[stage.name], *stage.overrides],
    )

    def run(export: str, evaluate: str) -> tuple[str, str]:
        stages = [
            StageConfig(name="export", verb="x", output="model/weights", overrides=[export]),
            StageConfig(name="evaluate", verb="x", output="model/eval/scores", overrides=[evaluate]),
        ]
        PipelineRunner(PipelineConfig(name="r", stages=stages), "k").run()
        model = tmp_path / "runs" / "r" / "model"
        return (model / "weights").read_text(), (model / "eval" / "scores").read_text()

    assert run("1", "a") == ("1", "x")
    assert run("1", "b") == ("1", "xx")
    assert run("2", "b") == ("2", "xxx")


@pytest.mark.parametrize(("init_from", "moved"), [("demo/cpt", "mine/cpt"), ("demographics", "demographics"), ("", "")])
def test_a_run_to_start_from_moves_with_its_pipeline(init_from: str, moved: str) -> None:
    keys = ["run=demo/sft", "model=a/b", "data=c/d", "optim.steps=3", f"init_from={init_from}"]
    config = app.compose("train", keys)
    stage_runner.relocate(config, PipelineConfig(name="demo", stages=[]), "elsewhere", "mine")
    assert (config.runs, config.run, config.init_from) == ("elsewhere", "mine/sft", moved)


def test_an_interrupt_reaches_the_stage_and_lets_it_save(tmp_path: Path) -> None:
    import os
    import signal
    import subprocess
    import time

    stage = (
        "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: (print('saved', flush=True), "
        "sys.exit(75))); print('ready', flush=True); time.sleep(60)"
    )
    code = (
        "import sys; from pathlib import Path; from fireflyds.pipelines.stage_runner import _execute\n"
        f"try:\n    _execute([sys.executable, '-c', {stage!r}], Path('log'), lambda: None)\n"
        "except KeyboardInterrupt:\n    sys.exit(130)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=tmp_path, start_new_session=True)
    until = time.monotonic() + 30
    while not (tmp_path / "log").exists() or "ready" not in (tmp_path / "log").read_text():
        assert time.monotonic() < until
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 130
    assert (tmp_path / "log").read_text().split() == ["ready", "saved"]
