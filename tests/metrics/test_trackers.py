"""W&B runs, read back from their offline file; trackers that fail; TensorBoard events."""

import json
import logging
import sys
import threading
import time
import types
from pathlib import Path

import pytest
from wandb_file import finished, history, records

from fireflyds import app
from fireflyds.config import TrainConfig
from fireflyds.errors import UserError
from fireflyds.metrics import trackers
from fireflyds.metrics.trackers import FaultTolerantTracker, NoTracker, open_tracker

ROW = {"step": 1, "loss": 2.5, "loss/zh": 2.75, "bits_per_byte/zh": 1.5, "lr/embeddings": 0.25}
VALIDATION = {
    "step": 2,
    "validation/loss/en": 3.0,
    "validation/bits_per_byte/en": 1.25,
    "validation/loss/zh": 4.0,
    "validation/bits_per_byte/zh": 1.5,
}
SAMPLES = [{"step": 2, "prompt": "青岭镇", "text": "的特产是蜂蜜。"}]


def config_of(tmp_path: Path, *overrides: str) -> TrainConfig:
    (tmp_path / "demo" / "cpt").mkdir(parents=True, exist_ok=True)
    start = ["run=demo/cpt", f"runs={tmp_path}", "model=a/b", "data=c/d", "optim.steps=9"]
    return app.compose("train", [*start, *overrides])


def open_tracker_of(config: TrainConfig, resumed_at: int = 0, rank: int = 0):
    return open_tracker(config, {"run": config.run, "seq_len": 1024}, rank, resumed_at, logging.getLogger("fireflyds"))


@pytest.fixture
def log_text(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logging.getLogger("fireflyds"), "propagate", True)
    caplog.set_level(logging.INFO, "fireflyds")
    return lambda: caplog.text


def test_wandb_offline_resumes_the_same_run(tmp_path: Path, log_text) -> None:
    config = config_of(
        tmp_path,
        "tracking=wandb",
        "tracking.mode=offline",
        "tracking.tags=[zh,7b]",
        "tracking.project=p",
        "tracking.entity=team",
        "tracking.job_type=cpt",
    )
    for resumed_at in (0, 1):
        tracker = open_tracker_of(config, resumed_at)
        tracker.log(ROW)
        tracker.log({**ROW, "step": 2, "loss": 2.25 - resumed_at})
        tracker.log(VALIDATION)
        tracker.log_samples(2, SAMPLES)
        tracker.finish(0)
        time.sleep(1.1)  # W&B names folders by the second
    assert "W&B is offline" in log_text()
    assert "failed" not in log_text()
    run_dir = tmp_path / "demo" / "cpt"
    files = [finished(file) for file in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))]
    assert len(files) == 2
    runs = [next(r.run for r in records(file) if r.WhichOneof("record_type") == "run") for file in files]
    name = json.loads((run_dir / "wandb.json").read_text())["id"]
    for run in runs:
        assert (run.run_id, run.display_name, run.run_group, run.job_type) == (name, "demo-cpt", "demo", "cpt")
        assert (run.project, run.entity, list(run.tags)) == ("p", "team", ["zh", "7b"])
        assert {item.key: json.loads(item.value_json) for item in run.config.update}["seq_len"] == 1024
    rows = history(files[1])
    assert [row["loss"] for row in rows if "loss" in row] == [2.5, 1.25]
    assert rows[0]["loss/zh"] == 2.75
    assert all("step" in row for row in rows)
    # Every key is plotted over `step`, so that both starts share the axis.
    metrics = [r.metric for r in records(files[1]) if r.WhichOneof("record_type") == "metric"]
    assert ("*", "step") in [(metric.glob_name, metric.step_metric) for metric in metrics]
    tables = {
        key: row[f"{key}.path"] for row in rows for key in ("samples", "validation_table") if f"{key}.path" in row
    }
    folder = files[1].parent / "files"
    assert json.loads((folder / tables["samples"]).read_text()) == {
        "columns": ["step", "prompt", "text"],
        "data": [[2, "青岭镇", "的特产是蜂蜜。"]],
    }
    table = json.loads((folder / tables["validation_table"]).read_text())
    assert table["data"] == [[2, "en", 3.0, 1.25], [2, "zh", 4.0, 1.5]]


def test_an_export_is_logged_to_its_run_as_an_artifact(tmp_path: Path) -> None:
    config = config_of(tmp_path, "tracking=wandb", "tracking.mode=offline")
    run_dir, folder = tmp_path / "demo" / "cpt", tmp_path / "out"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    assert (
        trackers.log_model_artifact(config.tracking, config.run, run_dir, folder, {"checkpoint": "step-9"})
        == "demo-cpt"
    )
    file = finished(next(run_dir.glob("wandb/offline-run-*/*.wandb")))
    artifacts = [r.artifact for r in records(file) if r.WhichOneof("record_type") == "artifact"]
    assert [(artifact.name, artifact.type) for artifact in artifacts] == [("demo-cpt", "model")]
    assert [content.path for content in artifacts[0].manifest.contents] == ["model.safetensors"]
    assert json.loads(artifacts[0].metadata) == {"checkpoint": "step-9"}
    with pytest.raises(UserError, match=r"artifact=true: the run demo/cpt is not tracked by W&B \(tracking=none"):
        trackers.log_model_artifact(config_of(tmp_path).tracking, config.run, run_dir, folder, {})


class FakeWandbRun:
    """Stands in for a W&B run, and records its calls."""

    def __init__(self, error: str = "") -> None:
        self.error, self.calls = error, []

    def log_artifact(self, artifact):
        self.calls.append("given")
        return self

    def wait(self) -> None:
        if self.error:
            raise ValueError(self.error)
        self.calls.append("there")

    def define_metric(self, *arguments, **options) -> None: ...

    def finish(self, exit_code: int = 0) -> None:
        self.calls.append(exit_code)


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch):
    """Replaces `wandb.init` by a stand-in run, and returns the options of the call."""
    import wandb

    def install(run: FakeWandbRun) -> dict:
        options: dict = {}
        monkeypatch.setattr(wandb, "init", lambda **options_of_call: options.update(options_of_call) or run)
        return options

    return install


def test_an_artifact_is_awaited_before_the_run_is_finished(tmp_path: Path, fake_wandb) -> None:
    config, run = config_of(tmp_path, "tracking=wandb"), FakeWandbRun()
    run_dir, folder = tmp_path / "demo" / "cpt", tmp_path / "out"
    folder.mkdir()
    options = fake_wandb(run)
    assert trackers.log_model_artifact(config.tracking, config.run, run_dir, folder, {}) == "demo-cpt"
    assert options["settings"].finish_timeout == 0
    assert run.calls == ["given", "there", 0]
    fake_wandb(FakeWandbRun("storage quota\nexceeded"))
    with pytest.raises(UserError, match=r"artifact=true: W&B failed \(storage quota exceeded\)"):
        trackers.log_model_artifact(config.tracking, config.run, run_dir, folder, {})


@pytest.mark.parametrize("exit_code", [0, 1])
def test_the_exit_code_of_a_run_reaches_wandb(tmp_path: Path, fake_wandb, exit_code: int) -> None:
    options = fake_wandb(run := FakeWandbRun())
    open_tracker_of(config_of(tmp_path, "tracking=wandb", "tracking.finish_seconds=7")).finish(exit_code)
    assert run.calls == [exit_code]
    assert options["settings"].finish_timeout == 7


def test_mode_disabled_starts_no_tracker_and_is_logged(tmp_path: Path, log_text) -> None:
    tracker = open_tracker_of(config_of(tmp_path, "tracking=wandb", "tracking.mode=disabled"))
    assert isinstance(tracker, NoTracker)
    assert "nothing is tracked" in log_text()
    assert list((tmp_path / "demo" / "cpt").iterdir()) == []


def test_only_rank_zero_tracks(tmp_path: Path) -> None:
    assert isinstance(
        open_tracker_of(config_of(tmp_path, "tracking=wandb", "tracking.mode=offline"), rank=1), NoTracker
    )
    assert list((tmp_path / "demo" / "cpt").iterdir()) == []


def test_a_wandb_failure_at_start_is_logged_and_disables_tracking(
    tmp_path: Path, log_text, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def raise_comm_error(**options) -> None:
        raise wandb.errors.CommError("no route to\nhost")

    monkeypatch.setattr(wandb, "init", raise_comm_error)
    tracker = open_tracker_of(config_of(tmp_path, "tracking=wandb"))
    assert isinstance(tracker, NoTracker)
    assert "W&B did not start (no route to host); training continues without it" in log_text()


class FailingTracker:
    """A tracker that raises at its second row and counts its calls."""

    def __init__(self) -> None:
        self.num_calls = 0
        self.unblocked = threading.Event()

    def log(self, row) -> None:
        self.num_calls += 1
        if self.num_calls == 2:
            raise OSError("disk full")

    def log_samples(self, step, rows) -> None:
        self.num_calls += 1

    def rollback(self, step) -> None:
        self.num_calls += 1

    def finish(self, exit_code) -> None:
        self.unblocked.wait(30)


def test_a_tracker_that_fails_is_logged_once_and_not_called_again(log_text) -> None:
    failing_tracker = FailingTracker()
    tracker = FaultTolerantTracker(failing_tracker, "W&B", logging.getLogger("fireflyds"), 5)
    for step in (1, 2, 3):
        tracker.log({"step": step})
    tracker.log_samples(3, SAMPLES)
    tracker.rollback(1)
    start = time.monotonic()
    tracker.finish(0)
    assert time.monotonic() - start < 1
    assert failing_tracker.num_calls == 2
    assert log_text().count("W&B failed (disk full); training continues without it") == 1


def test_a_tracker_that_never_finishes_is_abandoned_after_the_timeout(log_text) -> None:
    blocked_tracker = FailingTracker()
    tracker = FaultTolerantTracker(blocked_tracker, "W&B", logging.getLogger("fireflyds"), 0.2)
    start = time.monotonic()
    tracker.finish(0)
    assert 0.15 < time.monotonic() - start < 2
    assert "W&B did not finish within 0.2 s and is abandoned" in log_text()
    blocked_tracker.unblocked.set()


@pytest.mark.parametrize("kind", ["wandb", "tensorboard"])
def test_a_missing_tracking_package_is_refused_by_require_installed(tmp_path: Path, kind, monkeypatch) -> None:
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError,
        match=rf"tracking={kind}: {kind} is not installed. Install it with pip install 'fireflyds\[tracking\]'",
    ):
        trackers.require_installed(config_of(tmp_path, f"tracking={kind}").tracking)
    trackers.require_installed(config_of(tmp_path).tracking)


def test_tensorboard_receives_scalars_and_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The calls that a stand-in for `SummaryWriter` receives."""
    calls: list[tuple] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            calls.append((folder, purge_step))

        def __getattr__(self, name: str):
            return lambda *arguments: calls.append((name, *arguments))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    tracker = open_tracker_of(config_of(tmp_path, "tracking=tensorboard"), resumed_at=7)
    tracker.log({"step": 8, "loss": 2.5, "loss/zh": None, "note": "x"})
    tracker.log_samples(8, SAMPLES)
    tracker.finish(0)
    assert calls[0] == (str(tmp_path / "demo" / "cpt" / "tensorboard"), 8)
    assert calls[1:] == [
        ("add_scalar", "loss", 2.5, 8),
        ("add_text", "samples/0", "青岭镇\n\n---\n\n的特产是蜂蜜。", 8),
        ("close",),
    ]


def test_tensorboard_events_are_read_back_or_a_missing_package_is_logged(tmp_path: Path, log_text) -> None:
    config = config_of(tmp_path, "tracking=tensorboard")
    tracker = open_tracker_of(config)
    if trackers.importlib.util.find_spec("tensorboard") is None:
        assert isinstance(tracker, NoTracker)
        assert "TensorBoard did not start (No module named 'tensorboard')" in log_text()
        return
    tracker.log(ROW)
    tracker.log({**ROW, "step": 2, "loss": 9.0})
    tracker.finish(0)
    resumed = open_tracker_of(config, resumed_at=1)
    resumed.log({**ROW, "step": 2, "loss": 2.25})
    # A rollback to step 1 within the run.
    resumed.log({**ROW, "step": 3, "loss": 8.0})
    resumed.rollback(1)
    resumed.log({**ROW, "step": 2, "loss": 2.0})
    resumed.finish(0)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "demo" / "cpt" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5), (2, 2.0)]
