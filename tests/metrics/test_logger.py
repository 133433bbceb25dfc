"""The files that a run writes at every checkpoint, and its console line."""

import json
import logging
from pathlib import Path

import pytest
from transformers import TrainerState

from fireflyds.errors import UserError
from fireflyds.metrics import plots
from fireflyds.metrics.console import format_steps
from fireflyds.metrics.logger import MetricsLogger
from fireflyds.runs.jsonl import read_jsonl
from fireflyds.types import StepMetrics


class RecordingTracker:
    """A tracker that records its calls."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.exit_codes: list[int] = []

    def log(self, row) -> None:
        self.rows.append(dict(row))

    def log_samples(self, step_metrics, rows) -> None:
        self.rows.append({"step": step_metrics, "samples": list(rows)})

    def rollback(self, step_metrics) -> None:
        self.rows.append({"step": step_metrics, "rollback": True})

    def finish(self, exit_code) -> None:
        self.exit_codes.append(exit_code)


def step_metrics(number: int, loss: float | None = None, **extra: float) -> StepMetrics:
    return StepMetrics(
        step=number,
        loss=4 / number if loss is None else loss,
        lr=0.5 / number,
        grad_norm=1.5,
        tokens=1000 * number,
        learned_tokens=900 * number,
        tokens_per_second=500.0,
        seconds=2.0,
        extra={"flops": 1e9, **extra},
    )


def open_logger(tmp_path: Path, first_step: int, rank: int = 0) -> tuple[MetricsLogger, RecordingTracker]:
    tracker = RecordingTracker()
    return MetricsLogger(
        tmp_path, tracker, logging.getLogger("fireflyds"), rank, first_step, 6, 2, steps_per_epoch=4.0
    ), tracker


def test_every_checkpoint_writes_a_trainer_state_that_transformers_reads(tmp_path: Path) -> None:
    logger, tracker = open_logger(tmp_path, 0)
    with logger:
        logger.log_validation({"step": 0, "validation/loss/en": 5.0, "validation/bits_per_byte/en": 2.5})
        for number in (1, 2, 3):
            logger.log_step(step_metrics(number))
        logger.log_checkpoint(3, 0.25)
        assert not tracker.exit_codes
    assert tracker.exit_codes == [0]
    state = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [row["step"] for row in tracker.rows] == [0, 1, 2, 3]
    assert (state.global_step, state.max_steps, state.epoch, state.num_train_epochs) == (3, 6, 0.75, 2)
    assert (state.logging_steps, state.num_input_tokens_seen, state.total_flos) == (2, 3000, 3e9)
    assert state.log_history == [
        {"epoch": 0.0, "step": 0, "eval_loss_en": 5.0, "eval_bits_per_byte_en": 2.5},
        {"epoch": 0.5, "step": 2, "loss": 3.0, "learning_rate": 0.25, "grad_norm": 1.5},
    ]


def test_a_resume_truncates_and_continues_the_log_history(tmp_path: Path) -> None:
    logger, _ = open_logger(tmp_path, 0)
    with logger:
        for number in (1, 2, 3, 4):
            logger.log_step(step_metrics(number))
    resumed, _ = open_logger(tmp_path, 2)
    with resumed:
        for number in (3, 4, 5, 6):
            resumed.log_step(step_metrics(number, loss=float("nan") if number == 5 else 1.0))
    trainer_state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [(row["step"], row["loss"]) for row in trainer_state["log_history"]] == [(2, 3.0), (4, 1.0), (6, 1.0)]
    assert [row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [4.0, 2.0, 1.0, 1.0, None, 1.0]
    assert trainer_state["global_step"] == trainer_state["max_steps"] == 6


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    logger, _ = open_logger(tmp_path, 0, rank=1)
    with logger:
        logger.log_step(step_metrics(1))
        logger.log_checkpoint(1, 0.0)
    assert list(tmp_path.iterdir()) == []


FULL = {
    "loss/zh": 2.0,
    "loss/en": 1.0,
    "bits_per_byte": 0.75,
    "mfu": 0.5,
    "fill": 0.99,
    "memory_gib": 12.25,
    "data_wait_seconds": 0.0,
    "step_seconds_spread": 0.0,
    "slowest_rank": 0,
    "slowest_seconds": 1.0,
    "eta_seconds": 3725.0,
    "skipped_steps": 0.0,
}


def test_the_console_line_has_means_of_losses_and_the_latest_of_other_metrics() -> None:
    steps = [
        step_metrics(1, 3.0, **FULL),
        step_metrics(2, 2.0, **(FULL | {"loss/zh": 1.0, "mfu": 0.25, "bits_per_byte": 0.25})),
    ]
    assert format_steps(steps, 10) == (
        "step 2/10  loss 2.5000 (zh 1.500, en 1.000)  bits/byte 0.5000  lr 2.50e-01  grad_norm 1.500  500 tokens/s  "
        "MFU 37.5%  fill 99.0%  12.2 GiB  2,000 tokens  ETA 1:02:05"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"data_wait_seconds": 0.5}, "data wait 0.50 s"),
        ({"step_seconds_spread": 0.25, "slowest_rank": 3}, "rank 3 slowest by 0.25 s"),
        ({"skipped_steps": 2.0}, "2 skipped"),
        ({"loss_scale": 1024.0}, "loss scale 1024"),
    ],
)
def test_the_console_line_has_warnings_only_for_abnormal_values(changes: dict, expected: str) -> None:
    assert expected in format_steps([step_metrics(1, **(FULL | changes))], 10)
    assert expected not in format_steps([step_metrics(1, **FULL)], 10)


@pytest.fixture
def log_text(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logging.getLogger("fireflyds"), "propagate", True)
    return lambda: caplog.text


def test_a_plot_that_fails_is_logged_and_does_not_fail_the_run(tmp_path: Path, log_text, monkeypatch) -> None:
    def raise_disk_full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fireflyds.metrics.history.plot_loss", raise_disk_full)
    logger, tracker = open_logger(tmp_path, 0)
    with logger:
        logger.log_step(step_metrics(1))
        logger.log_checkpoint(1, 0.0)
    assert log_text().count("loss.png was not written ([Errno 28] No space left on device)") == 2
    assert tracker.exit_codes == [0]
    assert (tmp_path / "trainer_state.json").exists()
    monkeypatch.setattr("fireflyds.metrics.history.atomic_write_text", raise_disk_full)
    failed_logger, tracker = open_logger(tmp_path, 1)
    with pytest.raises(UserError, match="the loss is nan"), failed_logger:
        raise UserError("the loss is nan")
    assert log_text().count("loss.png was not written") == 3
    assert tracker.exit_codes == [1]


def test_a_rollback_reaches_the_tracker(tmp_path: Path) -> None:
    logger, tracker = open_logger(tmp_path, 0)
    with logger:
        for number in (1, 2):
            logger.log_step(step_metrics(number))
        logger.rollback(1)
    assert tracker.rows[-1] == {"step": 1, "rollback": True}
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1]


def test_nan_validation_metrics_are_null_in_the_trainer_state(tmp_path: Path) -> None:
    logger, _ = open_logger(tmp_path, 0)
    with logger:
        logger.log_step(step_metrics(1))
        logger.log_validation({"step": 1, "validation/loss/en": float("nan"), "validation/loss": 2.0})
    text = (tmp_path / "trainer_state.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["log_history"] == [{"epoch": 0.25, "step": 1, "eval_loss_en": None, "eval_loss": 2.0}]


@pytest.mark.parametrize("width", [1, 3, 7])
def test_the_running_mean_equals_the_mean_of_each_window(width: int) -> None:
    values = [1e30, 0.5, 2.0, 4.0, -1.0, 1e-3, 9.0]
    expected = [sum(values[index : index + width]) / width for index in range(len(values) - width + 1)]
    assert plots.running_mean(values, width).tolist() == pytest.approx(expected, rel=1e-9)
    assert plots.running_mean([], 1).tolist() == []


def test_a_plot_that_fails_closes_its_figure(tmp_path: Path) -> None:
    from matplotlib import pyplot

    with pytest.raises(FileNotFoundError):
        plots.plot_loss({"r": [{"loss": 1.0, "tokens": 1}]}, tmp_path / "nowhere" / "loss.png")
    assert pyplot.get_fignums() == []


def test_a_tracker_is_finished_when_the_files_of_the_run_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    tracker = RecordingTracker()
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        MetricsLogger(tmp_path, tracker, logging.getLogger("fireflyds"), 0, 0, 6, 2, steps_per_epoch=4.0)
    assert tracker.exit_codes == [1]
