"""The course of a run: step by step, with what must happen between steps."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fireflyds.config import TrainConfig
from fireflyds.engine import checkpoint, spikes
from fireflyds.engine.checkpoint import Saver
from fireflyds.engine.journal import Journal
from fireflyds.engine.loop import Loader, train_steps
from fireflyds.engine.requests import Requests
from fireflyds.engine.statistics import Measured
from fireflyds.engine.status import EXIT_INTERRUPTED, EXIT_STOPPED, Status
from fireflyds.engine.validation import Validator
from fireflyds.errors import UserError
from fireflyds.models.fuse import device_batch
from fireflyds.types import StepMetrics, TrainState


@dataclass(frozen=True, slots=True)
class Course:
    """One run on this rank. All ranks follow it together and decide the same."""

    config: TrainConfig
    engine: Any
    loader: Loader
    measured: Measured
    validator: Validator
    saver: Saver
    journal: Journal
    status: Status
    _told: list[str] = field(default_factory=list, init=False)

    def follow(self, state: TrainState, total_steps: int) -> int:
        """Train to the end, or until asked to stop. The exit code: 0 at the end.

        Raises:
            UserError: the loss does not recover, a guarded domain gets worse, or a checkpoint cannot be written.
        """
        requests = Requests(Path(self.config.run_dir))
        self.status.step = state.step
        self.status.write("running")
        while state.step < total_steps:
            config = self.config
            if risen := self.validator.begin(self.engine, self.journal, state.step):
                raise UserError(f"validation.stop=true: {risen}")
            for step in train_steps(self.engine, self.loader, state, config, total_steps, device_batch, self.measured):
                spiked = spikes.is_spike(state, step.loss, config.recovery)
                if spiked and (saved := self._go_back(state, step, total_steps)):
                    state = saved
                    break
                self._pass(step)
                if left := self._between(state, step, requests, last=step.step == total_steps):
                    self.saver.finish()
                    self.journal.log.info(
                        f"stopped at step {step.step} ({requests.reason or 'asked on another rank'}), checkpoint saved; the same command goes on from here"
                    )
                    self.status.write("stopped", left, requests.reason)
                    return left
        self.saver.finish()
        self.status.write("finished", 0)
        return 0

    def _between(self, state: TrainState, step: StepMetrics, requests: Requests, *, last: bool) -> int:
        """What happens after a step. The exit code where the run is to stop before its end, or 0."""
        asked = requests.agreed(self.engine.device, self.saver.failed)
        if asked.failed:
            self.saver.finish()
        stopping = asked.stop and not last
        risen = None if stopping else self.validator.after(self.engine, self.journal, step.step)
        if stopping or asked.save or risen or last or step.step % self.config.checkpoint.every == 0:
            self._save(state, step)
        if risen:
            self.saver.finish()
            raise UserError(f"validation.stop=true: {risen}. A checkpoint was saved")
        return (EXIT_STOPPED if asked.stay else EXIT_INTERRUPTED) if stopping else 0

    def _save(self, state: TrainState, step: StepMetrics) -> None:
        """With the numbers of this step's validation, where there was one: `checkpoint.best_metric` may name them."""
        newest = self.validator.newest
        validated = {key: value for key, value in newest.items() if key.startswith("validation/") and value is not None}
        measured = replace(step, extra=step.extra | validated) if newest.get("step") == step.step else step
        wanted, known = self.config.checkpoint.best_metric, measured.as_dict()
        if wanted and wanted not in known and wanted not in self._told and dist.get_rank() == 0:
            self._told.append(wanted)
            self.journal.log.warning(
                f"checkpoint.best_metric={wanted}: not measured at step {step.step}, so this checkpoint cannot be the best. "
                f"Measured at steps: {', '.join(step.as_dict())}; at validations: {', '.join(validated) or 'nothing'}"
            )
        self.journal.saved(step.step, self.saver.begin(state, measured))

    def _pass(self, step: StepMetrics) -> None:
        self.journal.record(step)
        self.status.step = step.step

    def _go_back(self, spoilt: TrainState, step: StepMetrics, total_steps: int) -> TrainState | None:
        """To the newest checkpoint, passing over the data since. None where there is none: the run goes on.

        Raises:
            UserError: this has happened too often, or the data do not last for what is passed over.
        """
        self.saver.finish()
        saved = checkpoint.load(self.engine, Path(self.config.run_dir), self.journal.log.warning)
        if not saved.step:
            self.journal.log.warning(
                f"step {step.step}: loss {step.loss:.4f} is a spike, and there is no checkpoint to go back to"
            )
            # From now on it is among those that a spike stands out of.
            spoilt.recent_losses.append(step.loss)
            return None
        spikes.pass_over(spoilt, saved, self.config.recovery)
        # Asked here, where all ranks are: the loaders of some would come to the end of the data before those of others.
        try:
            self.loader.require(total_steps + saved.passed_over)
        except UserError as error:
            raise UserError(
                f"step {spoilt.step}: loss {step.loss:.4f} is a spike (recovery.rollback_above), and with {saved.passed_over} steps of "
                f"data passed over the rest are too few: {error}"
            ) from error
        self.journal.log.warning(
            f"step {step.step}: loss {step.loss:.4f} is a spike (recovery.rollback_above); back to step {saved.step}, the data of "
            f"{spoilt.step - saved.step} steps is passed over"
        )
        self.journal.go_back(saved.step)
        return saved
