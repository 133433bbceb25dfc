"""A pipeline resumes at the stage that failed, reuses complete outputs, and reruns stages after a changed one."""

import sys
from pathlib import Path

import pytest

from fireflyds import app
from fireflyds.config import PipelineConfig, StageConfig
from fireflyds.errors import UserError
from fireflyds.pipelines import stage_runner
from fireflyds.pipelines.stage_runner import PipelineRunner


@pytest.fixture
def run_pipeline(tmp_path: Path, monkeypatch):
    """Runs a pipeline whose stages append their name to a log file, and fail while a file `broken-<stage>` exists."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "r").mkdir(parents=True)
    script = (
        "import sys, pathlib as p; out, name = map(p.Path, sys.argv[1:3]); (out / "
        "'stages.log').open('a').write(f'{name} '); "
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
        log_before = _read_log(tmp_path / "runs" / "r")
        PipelineRunner(PipelineConfig(name="r", stages=stages), seed).run()
        return _read_log(tmp_path / "runs" / "r")[len(log_before) :].strip()

    return run


def _read_log(folder: Path) -> str:
    file = folder / "stages.log"
    return file.read_text() if file.exists() else ""


def test_complete_stages_are_reused(run_pipeline) -> None:
    assert run_pipeline() == "a b c"
    assert run_pipeline() == ""


def test_a_changed_stage_and_the_later_ones_run_again(run_pipeline) -> None:
    run_pipeline()
    assert run_pipeline(second="other") == "b c"
    assert run_pipeline(second="other", seed="new") == "a b c"


def test_a_failed_stage_stops_the_pipeline_and_runs_again(run_pipeline, tmp_path: Path) -> None:
    (tmp_path / "runs" / "r" / "broken-b").touch()
    with pytest.raises(UserError, match=r"b: .* failed with exit code 3"):
        run_pipeline()
    (tmp_path / "runs" / "r" / "broken-b").unlink()
    assert run_pipeline() == "b c"


def test_a_stage_with_a_deleted_output_runs_again(run_pipeline, tmp_path: Path) -> None:
    run_pipeline()
    (tmp_path / "runs" / "r" / "b" / "made").unlink()
    assert run_pipeline() == "b"


def test_a_second_process_is_refused(run_pipeline, tmp_path: Path) -> None:
    import fcntl

    with (tmp_path / "runs" / "r" / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process runs this pipeline"):
            run_pipeline()


def test_files_not_written_by_a_stage_are_kept(run_pipeline, tmp_path: Path) -> None:
    foreign_file = tmp_path / "runs" / "r" / "a" / "thesis.txt"
    foreign_file.parent.mkdir()
    foreign_file.write_text("years of work")
    run_pipeline()
    assert foreign_file.read_text() == "years of work"


def test_files_of_later_stages_in_an_output_do_not_block_a_rerun(tmp_path: Path, monkeypatch) -> None:
    """Training caches plans in a store and evaluation writes into an export; both are rebuilt without losing files."""
    monkeypatch.chdir(tmp_path)
    export_script = (
        "import sys; from pathlib import Path; from fireflyds.fs import Output, atomic_dir\n"
        "with atomic_dir(Path('runs/r/model'), Output('export')) as folder:\n"
        "    (folder / 'weights').write_text(sys.argv[1])\n"
    )
    evaluate_script = (
        "from pathlib import Path; Path('runs/r/model/eval').mkdir(exist_ok=True)\n"
        "with Path('runs/r/model/eval/scores').open('a') as file: file.write('x')\n"
    )
    scripts = {"export": export_script, "evaluate": evaluate_script}
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


@pytest.mark.parametrize(
    ("init_from", "relocated"), [("demo/cpt", "mine/cpt"), ("demographics", "demographics"), ("", "")]
)
def test_init_from_is_relocated_with_its_pipeline(init_from: str, relocated: str) -> None:
    keys = ["run=demo/sft", "model=a/b", "data=c/d", "optim.steps=3", f"init_from={init_from}"]
    config = app.compose("train", keys)
    stage_runner.relocate(config, PipelineConfig(name="demo", stages=[]), "elsewhere", "mine")
    assert (config.runs, config.run, config.init_from) == ("elsewhere", "mine/sft", relocated)


def test_an_interrupt_reaches_the_stage_which_saves_before_exit(tmp_path: Path) -> None:
    import os
    import signal
    import subprocess
    import time

    stage_script = (
        "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: (print('saved', flush=True), "
        "sys.exit(75))); print('ready', flush=True); time.sleep(60)"
    )
    runner_script = (
        "import sys; from pathlib import Path; from fireflyds.pipelines.stage_runner import _execute\n"
        f"try:\n    _execute([sys.executable, '-c', {stage_script!r}], Path('log'), lambda: None)\n"
        "except KeyboardInterrupt:\n    sys.exit(130)"
    )
    process = subprocess.Popen([sys.executable, "-c", runner_script], cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 30
    while not (tmp_path / "log").exists() or "ready" not in (tmp_path / "log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    assert process.wait(20) == 130
    assert (tmp_path / "log").read_text().split() == ["ready", "saved"]
