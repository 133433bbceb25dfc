"""The course of a run, step by step, with an engine, a disk and requests that are played: what is heard, saved and
passed over."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from fireflyds import app
from fireflyds.distributed.signals import StopRequest
from fireflyds.errors import UserError
from fireflyds.metrics.profiler import StepProfiler
from fireflyds.train.trainer import Trainer
from fireflyds.types import StepMetrics, TrainState


class Played:
    """What a course asks of everything around it, and what it tells."""

    def __init__(self, tmp_path: Path, losses, *overrides: str, stop_at: int = 0, last: int = 40) -> None:
        start = ["run=r", f"runs={tmp_path}", "model=a/b", "data=c/d", "optim.steps=40", "recovery.rollback_above=2"]
        self.config = app.compose("train", [*start, *overrides])
        self.losses, self.stop_at, self.last = losses, stop_at, last
        self.lines: list[str] = []
        self.recorded: list[int] = []
        self.saved: list[StepMetrics] = []
        self.kept = TrainState()
        self.polled: list[int] = []
        self.required: list[int] = []
        self.rolled_back: list[int] = []
        self.newest: dict = {}
        self.risen: UserError | None = None
        self.log = logging.Logger("course")
        self.log.addHandler(handler := logging.Handler())
        handler.emit = lambda record: self.lines.append(record.getMessage())  # type: ignore[method-assign]
        self.device, self.failed, self.reason, self.step = None, False, "SIGTERM", 0

    def steps(self, engine, objective, loader, state, config, total_steps, *_):
        while state.step < total_steps:
            state.step += 1
            loss = self.losses(state.step, state.skipped_batches)
            yield StepMetrics(state.step, loss, 0.1, 1.0, 1, 1, 1.0, 1.0, {"loss/zh": loss})

    def require(self, steps: int) -> None:
        self.required.append(steps)
        if steps > self.last:
            raise UserError("data.max_epochs: the data last for 9 rows")

    def poll(self, device, failed) -> StopRequest:
        self.polled.append(self.recorded[-1])
        return StopRequest(save=False, stop=self.recorded[-1] == self.stop_at, no_requeue=False, failed=False)

    def begin(self, engine, logger, step) -> str | None:
        return self.risen

    def save(self, state: TrainState, metrics: StepMetrics) -> float:
        self.saved.append(metrics)
        self.kept = TrainState(**state.as_dict())
        return 0.0

    def restore_latest(self, say) -> TrainState:
        return TrainState(**self.kept.as_dict())

    def log_step(self, step: StepMetrics) -> None:
        self.recorded.append(step.step)

    def log_checkpoint(self, step: int, seconds: float) -> None: ...

    def rollback(self, step: int) -> None:
        self.rolled_back.append(step)

    def after(self, *_) -> None: ...

    def wait(self) -> None: ...

    def write(self, *_) -> None: ...

    def fit(self, monkeypatch: pytest.MonkeyPatch, steps: int = 40) -> int:
        monkeypatch.setattr("fireflyds.train.trainer.train_steps", self.steps)
        monkeypatch.setattr("fireflyds.train.trainer.dist", SimpleNamespace(get_rank=lambda: 0))
        monkeypatch.setattr("fireflyds.planner.measured_memory.format_peak", lambda _: "measured")
        trainer = Trainer(
            config=self.config,
            engine=self,
            objective=None,
            loader=self,
            metrics_context=None,
            validator=self,
            checkpoints=self,
            logger=self,
            signals=self,
            status=self,
            state=TrainState(),
            total_steps=steps,
            profiler=StepProfiler(self.config.profile, Path(self.config.run_dir), 0, self.log),
            memory_plan="planned",
            resident_before=0,
        )
        return trainer.fit()


def up_from_13(step: int, skipped_batches: int) -> float:
    return 1.0 if step < 13 else 3.0


def test_a_spike_before_the_first_checkpoint_neither_deafens_a_run_nor_keeps_it_from_saving(
    tmp_path: Path, monkeypatch
) -> None:
    run = Played(tmp_path, up_from_13, "checkpoint.every=30")
    assert run.fit(monkeypatch) == 0
    assert run.recorded == run.polled == list(range(1, 41))
    assert [metrics.step for metrics in run.saved] == [30, 40]
    assert run.rolled_back == []
    told = [line for line in run.lines if "is a spike, and there is no checkpoint to restore" in line]
    # Each of them raises the mean that the next is held against: of 12 losses of 1 and n of 3 it is below 1.5
    # for n < 4.
    assert [line.split(":")[0] for line in told] == ["step 13", "step 14", "step 15", "step 16"]


def test_a_run_that_spikes_is_stopped_when_it_is_asked_to(tmp_path: Path, monkeypatch) -> None:
    run = Played(tmp_path, up_from_13, stop_at=14)
    assert run.fit(monkeypatch) == 75
    assert (run.recorded[-1], [metrics.step for metrics in run.saved]) == (14, [14])


def test_a_run_goes_back_from_a_spike_and_asks_for_the_data_it_will_need(tmp_path: Path, monkeypatch) -> None:
    run = Played(
        tmp_path,
        lambda step, skipped_batches: 9.0 if step + skipped_batches == 13 else 1.0,
        "checkpoint.every=11",
        last=42,
    )
    assert run.fit(monkeypatch) == 0
    assert run.recorded == [*range(1, 13), *range(12, 41)]
    assert (run.rolled_back, run.required) == ([11], [42])
    assert (run.kept.skipped_batches, run.kept.rollbacks) == (2, 1)


def test_data_that_do_not_last_for_what_is_passed_over_end_the_run_at_the_spike(tmp_path: Path, monkeypatch) -> None:
    run = Played(tmp_path, up_from_13, "checkpoint.every=11", last=41)
    with pytest.raises(
        UserError,
        match=r"step 13: loss 3.0000 is a spike .* with 2 steps of data skipped too few remain: data.max_epochs",
    ):
        run.fit(monkeypatch)
    assert run.recorded[-1] == 12


def test_a_validation_before_the_first_step_of_a_start_may_end_the_run(tmp_path: Path, monkeypatch) -> None:
    run = Played(tmp_path, up_from_13)
    run.risen = UserError("rose", key="validation.guard", value="en")
    with pytest.raises(UserError, match="^validation.guard=en: rose$"):
        run.fit(monkeypatch)
    assert run.recorded == []


def test_a_checkpoint_knows_the_validation_of_its_step(tmp_path: Path, monkeypatch) -> None:
    run = Played(tmp_path, lambda *_: 1.0, "checkpoint.every=2", "checkpoint.best_metric=validation/loss/en")
    run.newest = {"step": 2, "data": "x", "validation/loss/en": 2.5, "validation/loss": None, "validation_seconds": 1}
    run.fit(monkeypatch, 2)
    assert run.saved[0].as_dict()["validation/loss/en"] == 2.5
    assert run.saved[0].extra == {"loss/zh": 1.0, "validation/loss/en": 2.5}
    assert run.lines == ["planned; measured"]


def test_a_best_metric_that_nobody_measures_is_told_once(tmp_path: Path, monkeypatch) -> None:
    run = Played(tmp_path, lambda *_: 1.0, "checkpoint.every=2", "checkpoint.best_metric=validation/los")
    run.newest = {"step": 0, "validation/loss/en": 2.5}
    run.fit(monkeypatch, 6)
    assert [metrics.step for metrics in run.saved] == [2, 4, 6]
    assert run.saved[0].extra == {"loss/zh": 1.0}
    assert run.lines == [
        "checkpoint.best_metric=validation/los: not measured at step 2, so this checkpoint cannot be the best. "
        "Measured at steps: step, loss, lr, grad_norm, tokens, learned_tokens, tokens_per_second, seconds, loss/zh; "
        "at validations: validation/loss/en",
        "planned; measured",
    ]
