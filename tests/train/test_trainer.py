"""The training loop with stand-ins for the engine, the checkpoints and stop requests: polling, saving, rollbacks."""

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


class TrainerHarness:
    """Stands in for every collaborator of `Trainer`, and records the calls."""

    def __init__(self, tmp_path: Path, losses, *overrides: str, stop_at: int = 0, last: int = 40) -> None:
        start = ["run=r", f"runs={tmp_path}", "model=a/b", "data=c/d", "optim.steps=40", "recovery.rollback_above=2"]
        self.config = app.compose("train", [*start, *overrides])
        self.losses, self.stop_at, self.last_step = losses, stop_at, last
        self.messages: list[str] = []
        self.logged_steps: list[int] = []
        self.saved_metrics: list[StepMetrics] = []
        self.saved_state = TrainState()
        self.polled_steps: list[int] = []
        self.required_steps: list[int] = []
        self.rollback_steps: list[int] = []
        self.newest: dict = {}
        self.validation_error: UserError | None = None
        self.log = logging.Logger("course")
        self.log.addHandler(handler := logging.Handler())
        handler.emit = lambda record: self.messages.append(record.getMessage())  # type: ignore[method-assign]
        self.device, self.failed, self.reason, self.step = None, False, "SIGTERM", 0

    def steps(self, engine, objective, loader, state, config, total_steps, *_):
        while state.step < total_steps:
            state.step += 1
            loss = self.losses(state.step, state.skipped_batches)
            yield StepMetrics(state.step, loss, 0.1, 1.0, 1, 1, 1.0, 1.0, {"loss/zh": loss})

    def require(self, steps: int) -> None:
        self.required_steps.append(steps)
        if steps > self.last_step:
            raise UserError("data.max_epochs: the data last for 9 rows")

    def poll(self, device, failed) -> StopRequest:
        self.polled_steps.append(self.logged_steps[-1])
        return StopRequest(save=False, stop=self.logged_steps[-1] == self.stop_at, no_requeue=False, failed=False)

    def begin(self, engine, logger, step) -> str | None:
        return self.validation_error

    def save(self, state: TrainState, metrics: StepMetrics) -> float:
        self.saved_metrics.append(metrics)
        self.saved_state = TrainState(**state.as_dict())
        return 0.0

    def restore_latest(self, say) -> TrainState:
        return TrainState(**self.saved_state.as_dict())

    def log_step(self, step: StepMetrics) -> None:
        self.logged_steps.append(step.step)

    def log_checkpoint(self, step: int, seconds: float) -> None: ...

    def rollback(self, step: int) -> None:
        self.rollback_steps.append(step)

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


def loss_rising_at_step_13(step: int, skipped_batches: int) -> float:
    return 1.0 if step < 13 else 3.0


def test_a_spike_before_the_first_checkpoint_disables_neither_stop_requests_nor_saving(
    tmp_path: Path, monkeypatch
) -> None:
    run = TrainerHarness(tmp_path, loss_rising_at_step_13, "checkpoint.every=30")
    assert run.fit(monkeypatch) == 0
    assert run.logged_steps == run.polled_steps == list(range(1, 41))
    assert [metrics.step for metrics in run.saved_metrics] == [30, 40]
    assert run.rollback_steps == []
    spikes = [line for line in run.messages if "is a spike, and there is no checkpoint to restore" in line]
    # Each spike raises the mean that the next loss is compared with: of 12 losses of 1 and n of 3 it is below 1.5
    # for n < 4.
    assert [line.split(":")[0] for line in spikes] == ["step 13", "step 14", "step 15", "step 16"]


def test_a_run_with_a_loss_spike_stops_on_request(tmp_path: Path, monkeypatch) -> None:
    run = TrainerHarness(tmp_path, loss_rising_at_step_13, stop_at=14)
    assert run.fit(monkeypatch) == 75
    assert (run.logged_steps[-1], [metrics.step for metrics in run.saved_metrics]) == (14, [14])


def test_a_spike_rolls_back_and_requires_data_for_the_skipped_steps(tmp_path: Path, monkeypatch) -> None:
    run = TrainerHarness(
        tmp_path,
        lambda step, skipped_batches: 9.0 if step + skipped_batches == 13 else 1.0,
        "checkpoint.every=11",
        last=42,
    )
    assert run.fit(monkeypatch) == 0
    assert run.logged_steps == [*range(1, 13), *range(12, 41)]
    assert (run.rollback_steps, run.required_steps) == ([11], [42])
    assert (run.saved_state.skipped_batches, run.saved_state.rollbacks) == (2, 1)


def test_too_few_data_for_the_skipped_steps_end_the_run_at_the_spike(tmp_path: Path, monkeypatch) -> None:
    run = TrainerHarness(tmp_path, loss_rising_at_step_13, "checkpoint.every=11", last=41)
    with pytest.raises(
        UserError,
        match=r"step 13: loss 3.0000 is a spike .* with 2 steps of data skipped too few remain: data.max_epochs",
    ):
        run.fit(monkeypatch)
    assert run.logged_steps[-1] == 12


def test_a_validation_error_before_the_first_step_ends_the_run(tmp_path: Path, monkeypatch) -> None:
    run = TrainerHarness(tmp_path, loss_rising_at_step_13)
    run.validation_error = UserError("rose", key="validation.guard", value="en")
    with pytest.raises(UserError, match="^validation.guard=en: rose$"):
        run.fit(monkeypatch)
    assert run.logged_steps == []


def test_a_checkpoint_records_the_validation_metrics_of_its_step(tmp_path: Path, monkeypatch) -> None:
    run = TrainerHarness(tmp_path, lambda *_: 1.0, "checkpoint.every=2", "checkpoint.best_metric=validation/loss/en")
    run.newest = {"step": 2, "data": "x", "validation/loss/en": 2.5, "validation/loss": None, "validation_seconds": 1}
    run.fit(monkeypatch, 2)
    assert run.saved_metrics[0].as_dict()["validation/loss/en"] == 2.5
    assert run.saved_metrics[0].extra == {"loss/zh": 1.0, "validation/loss/en": 2.5}
    assert run.messages == ["planned; measured"]


def test_an_unmeasured_best_metric_is_logged_once(tmp_path: Path, monkeypatch) -> None:
    run = TrainerHarness(tmp_path, lambda *_: 1.0, "checkpoint.every=2", "checkpoint.best_metric=validation/los")
    run.newest = {"step": 0, "validation/loss/en": 2.5}
    run.fit(monkeypatch, 6)
    assert [metrics.step for metrics in run.saved_metrics] == [2, 4, 6]
    assert run.saved_metrics[0].extra == {"loss/zh": 1.0}
    assert run.messages == [
        "checkpoint.best_metric=validation/los: not measured at step 2, so this checkpoint cannot be the best. "
        "Measured at steps: step, loss, lr, grad_norm, tokens, learned_tokens, tokens_per_second, seconds, loss/zh; "
        "at validations: validation/loss/en",
        "planned; measured",
    ]
