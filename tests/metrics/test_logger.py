"""What a run leaves at every save, and the line it says."""

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


class Listener:
    """A tracker that keeps what it is told."""

    def __init__(self) -> None:
        self.rows: list[dict] = []
        self.finished: list[int] = []

    def log(self, row) -> None:
        self.rows.append(dict(row))

    def log_samples(self, step, rows) -> None:
        self.rows.append({"step": step, "samples": list(rows)})

    def rollback(self, step) -> None:
        self.rows.append({"step": step, "gone back": True})

    def finish(self, exit_code) -> None:
        self.finished.append(exit_code)


def step(number: int, loss: float | None = None, **extra: float) -> StepMetrics:
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


def journal(tmp_path: Path, done: int, rank: int = 0) -> tuple[MetricsLogger, Listener]:
    listener = Listener()
    return MetricsLogger(
        tmp_path, listener, logging.getLogger("fireflyds"), rank, done, 6, 2, steps_per_epoch=4.0
    ), listener


def test_every_save_leaves_a_trainer_state_that_transformers_reads(tmp_path: Path) -> None:
    first, listener = journal(tmp_path, 0)
    with first:
        first.log_validation({"step": 0, "validation/loss/en": 5.0, "validation/bits_per_byte/en": 2.5})
        for number in (1, 2, 3):
            first.log_step(step(number))
        first.log_checkpoint(3, 0.25)
        assert not listener.finished
    assert listener.finished == [0]
    state = TrainerState.load_from_json(str(tmp_path / "trainer_state.json"))
    assert (tmp_path / "loss.png").read_bytes()[:4] == b"\x89PNG"
    assert [row["step"] for row in listener.rows] == [0, 1, 2, 3]
    assert (state.global_step, state.max_steps, state.epoch, state.num_train_epochs) == (3, 6, 0.75, 2)
    assert (state.logging_steps, state.num_input_tokens_seen, state.total_flos) == (2, 3000, 3e9)
    assert state.log_history == [
        {"epoch": 0.0, "step": 0, "eval_loss_en": 5.0, "eval_bits_per_byte_en": 2.5},
        {"epoch": 0.5, "step": 2, "loss": 3.0, "learning_rate": 0.25, "grad_norm": 1.5},
    ]


def test_the_history_goes_on_after_a_resume_without_what_was_cut(tmp_path: Path) -> None:
    first, _ = journal(tmp_path, 0)
    with first:
        for number in (1, 2, 3, 4):
            first.log_step(step(number))
    again, _ = journal(tmp_path, 2)
    with again:
        for number in (3, 4, 5, 6):
            again.log_step(step(number, loss=float("nan") if number == 5 else 1.0))
    found = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [(row["step"], row["loss"]) for row in found["log_history"]] == [(2, 3.0), (4, 1.0), (6, 1.0)]
    assert [row["loss"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [4.0, 2.0, 1.0, 1.0, None, 1.0]
    assert found["global_step"] == found["max_steps"] == 6


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    other, _ = journal(tmp_path, 0, rank=1)
    with other:
        other.log_step(step(1))
        other.log_checkpoint(1, 0.0)
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


def test_the_line_tells_means_of_what_varies_and_the_newest_of_the_rest() -> None:
    steps = [step(1, 3.0, **FULL), step(2, 2.0, **(FULL | {"loss/zh": 1.0, "mfu": 0.25, "bits_per_byte": 0.25}))]
    assert format_steps(steps, 10) == (
        "step 2/10  loss 2.5000 (zh 1.500, en 1.000)  bits/byte 0.5000  lr 2.50e-01  grad_norm 1.500  500 tokens/s  "
        "MFU 37.5%  fill 99.0%  12.2 GiB  2,000 tokens  ETA 1:02:05"
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data_wait_seconds": 0.5}, "data wait 0.50 s"),
        ({"step_seconds_spread": 0.25, "slowest_rank": 3}, "rank 3 slowest by 0.25 s"),
        ({"skipped_steps": 2.0}, "2 skipped"),
        ({"loss_scale": 1024.0}, "loss scale 1024"),
    ],
)
def test_the_line_tells_what_is_wrong_only_where_something_is(changes: dict, words: str) -> None:
    assert words in format_steps([step(1, **(FULL | changes))], 10)
    assert words not in format_steps([step(1, **FULL)], 10)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logging.getLogger("fireflyds"), "propagate", True)
    return lambda: caplog.text


def test_a_picture_that_fails_is_told_and_fails_no_run(tmp_path: Path, said, monkeypatch) -> None:
    def full(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fireflyds.metrics.history.plot_loss", full)
    finished, listener = journal(tmp_path, 0)
    with finished:
        finished.log_step(step(1))
        finished.log_checkpoint(1, 0.0)
    assert said().count("loss.png was not written ([Errno 28] No space left on device)") == 2
    assert listener.finished == [0]
    assert (tmp_path / "trainer_state.json").exists()
    monkeypatch.setattr("fireflyds.metrics.history.atomic_write_text", full)
    failed, listener = journal(tmp_path, 1)
    with pytest.raises(UserError, match="the loss is nan"), failed:
        raise UserError("the loss is nan")
    assert said().count("loss.png was not written") == 3
    assert listener.finished == [1]


def test_going_back_is_told_to_the_tracker(tmp_path: Path) -> None:
    gone, listener = journal(tmp_path, 0)
    with gone:
        for number in (1, 2):
            gone.log_step(step(number))
        gone.rollback(1)
    assert listener.rows[-1] == {"step": 1, "gone back": True}
    assert [row["step"] for row in read_jsonl(tmp_path / "metrics.jsonl")] == [1]


def test_what_is_no_number_in_a_validation_is_null_in_the_trainer_state(tmp_path: Path) -> None:
    found, _ = journal(tmp_path, 0)
    with found:
        found.log_step(step(1))
        found.log_validation({"step": 1, "validation/loss/en": float("nan"), "validation/loss": 2.0})
    text = (tmp_path / "trainer_state.json").read_text()
    assert "NaN" not in text
    assert json.loads(text)["log_history"] == [{"epoch": 0.25, "step": 1, "eval_loss_en": None, "eval_loss": 2.0}]


@pytest.mark.parametrize("width", [1, 3, 7])
def test_a_running_mean_is_the_mean_of_every_so_many(width: int) -> None:
    values = [1e30, 0.5, 2.0, 4.0, -1.0, 1e-3, 9.0]
    wanted = [sum(values[at : at + width]) / width for at in range(len(values) - width + 1)]
    assert plots.running_mean(values, width).tolist() == pytest.approx(wanted, rel=1e-9)
    assert plots.running_mean([], 1).tolist() == []


def test_a_picture_that_fails_leaves_no_figure_open(tmp_path: Path) -> None:
    from matplotlib import pyplot

    with pytest.raises(FileNotFoundError):
        plots.plot_loss({"r": [{"loss": 1.0, "tokens": 1}]}, tmp_path / "nowhere" / "loss.png")
    assert pyplot.get_fignums() == []


def test_a_tracker_is_finished_where_the_files_of_its_run_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    listener = Listener()
    with pytest.raises(OSError, match=r"metrics\.jsonl"):
        MetricsLogger(tmp_path, listener, logging.getLogger("fireflyds"), 0, 0, 6, 2, steps_per_epoch=4.0)
    assert listener.finished == [1]
