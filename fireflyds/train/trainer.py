"""A training run on one rank: builds its components from the config and runs the steps and the actions between them."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from fireflyds import app
from fireflyds.checkpoint import init_from
from fireflyds.checkpoint.manager import CheckpointManager
from fireflyds.checkpoint.storage import storage_of
from fireflyds.config import Precision, TrainConfig
from fireflyds.data.pack.loader import PackedLoader
from fireflyds.distributed.collectives import run_on_rank_zero
from fireflyds.distributed.heartbeat import Heartbeat
from fireflyds.distributed.launcher_env import RankInfo, rank_from_environment
from fireflyds.distributed.local_cache import stage_inputs
from fireflyds.distributed.preflight import check_ranks_agree
from fireflyds.distributed.signals import StopSignals
from fireflyds.errors import UserError
from fireflyds.metrics.accumulator import MetricsContext, build_metrics_context
from fireflyds.metrics.console import configure_logging
from fireflyds.metrics.logger import MetricsLogger
from fireflyds.metrics.profiler import StepProfiler
from fireflyds.metrics.trackers import open_tracker
from fireflyds.models.neftune import add_embedding_noise
from fireflyds.models.packed.derived_check import require_equivalence
from fireflyds.models.packed.forward import fuse
from fireflyds.models.tuning import adapter_config_of, load_tuned_model
from fireflyds.planner import measured_memory, memory
from fireflyds.runs.directory import open_run
from fireflyds.runs.layout import EXIT_INTERRUPTED, EXIT_STOPPED, FINISHED, RUNNING, STOPPED
from fireflyds.runs.status import Status
from fireflyds.train import loss_spike
from fireflyds.train.loop import Loader, train_steps
from fireflyds.train.objectives import Objective
from fireflyds.train.run_inputs import RunInputs
from fireflyds.train.summary import describe_run, describe_start
from fireflyds.train.validation import Validator
from fireflyds.types import StepMetrics, TrainState
from fireflyds.zero.engine import Engine, build_engine, init_distributed


@dataclass(slots=True)
class Trainer:
    """All ranks call the same methods in the same order and make the same decisions. `state`: progress of the run."""

    config: TrainConfig
    engine: Engine
    objective: Objective
    loader: Loader
    metrics_context: MetricsContext
    validator: Validator
    checkpoints: CheckpointManager
    logger: MetricsLogger
    signals: StopSignals
    status: Status
    state: TrainState
    total_steps: int
    profiler: StepProfiler
    memory_plan: str
    """Planned peak memory, logged together with the measured one at the end."""
    resident_before: int
    """Resident memory of this process in bytes before the model is loaded, used by the libraries."""
    _stack: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)
    _warned_best_metric: bool = field(default=False, init=False)

    @classmethod
    def build(cls, config: TrainConfig) -> "Trainer":
        """Joins the process group, locks the run directory, builds model and engine, restores the newest checkpoint.

        Raises:
            UserError: the inputs are inconsistent, the ranks differ, or the run's name is taken.
        """
        rank = rank_from_environment(os.environ)
        inputs = RunInputs.open(config, rank.world_size)
        text = app.to_yaml(config)
        # Keeps the channel's store open until the process group is initialized.
        _channel, notes = check_ranks_agree(rank, config, text, inputs.compared())
        init_distributed(rank, config.hardware.timeout_minutes)
        del _channel
        checked = partial(require_equivalence, inputs.hf_config, inputs.precision, notes.append)
        run_on_rank_zero(partial(checked, packed=config.packing))
        with contextlib.ExitStack() as stack:
            trainer = cls._build(rank, inputs, text, notes, stack)
            trainer._stack = stack.pop_all()
        return trainer

    @classmethod
    def _build(
        cls, rank: RankInfo, inputs: RunInputs, text: str, notes: list[str], stack: contextlib.ExitStack
    ) -> "Trainer":
        config, run_dir, total_steps = inputs.config, Path(inputs.config.run_dir), inputs.total_steps
        identity = inputs.base_identity()
        lock = run_on_rank_zero(
            lambda: open_run(config, text, identity | inputs.store.identity(), inputs.precision.name)
        )
        if lock is not None:
            stack.enter_context(lock)
        status = stack.enter_context(Status(run_dir, rank.rank, total_steps))
        stack.enter_context(Heartbeat(rank, run_dir, config.recovery.heartbeat_seconds, status))
        run_on_rank_zero(lambda: init_from.copy_initial_weights(config, identity))
        log = configure_logging(run_dir, rank.rank)
        local_config, store = stage_inputs(config, identity["base"], inputs.store, log.info)

        resident_before = measured_memory.resident_bytes()
        model = build_model(local_config, inputs.hf_config, inputs.precision)
        memory_plan = memory.format_memory(model, config, inputs.precision, rank.world_size, inputs.accumulation)
        log.info("\n".join([describe_run(inputs, model, rank.world_size), memory_plan, *inputs.notes, *notes]))
        # Before the engine is built: ZeRO-3 replaces parameters by empty tensors, so their shapes are lost.
        metrics_context = build_metrics_context(config, model, store, inputs.encoder, inputs.precision)
        adapter_config = adapter_config_of(model)
        engine = build_engine(model, config, inputs.precision, inputs.accumulation)

        writer = init_from.TrainableWeightsWriter(model, config, adapter_config, identity)
        checkpoints = stack.enter_context(CheckpointManager(engine, storage_of(run_dir), config.checkpoint, writer))
        state = checkpoints.restore_latest(log.warning)
        log.info(describe_start(state, total_steps))
        tracker = open_tracker(config, app.plain(text), rank.rank, state.step, log)
        stack.enter_context(inputs.attention)
        logger = stack.enter_context(
            MetricsLogger(
                run_dir, tracker, log, rank.rank, state.step, total_steps, config.log_every, inputs.steps_per_epoch
            )
        )
        batches = (config.micro_batch_size, config.global_batch_size)
        return cls(
            config=config,
            engine=engine,
            objective=inputs.objective,
            loader=PackedLoader(store, inputs.rows, *batches, rank.rank, rank.world_size),
            metrics_context=metrics_context,
            validator=inputs.validator,
            checkpoints=checkpoints,
            logger=logger,
            signals=StopSignals(run_dir),
            status=status,
            state=state,
            total_steps=total_steps,
            profiler=stack.enter_context(StepProfiler(config.profile, run_dir, rank.rank, log)),
            memory_plan=memory_plan,
            resident_before=resident_before,
        )

    def fit(self) -> int:
        """Trains until the last step or a stop request. Returns the exit code: 0 after the last step.

        Raises:
            UserError: the loss does not recover, a guarded domain gets worse, or a checkpoint cannot be written.
        """
        with self._stack:
            exit_code = self._fit()
            self.logger.log.info(f"{self.memory_plan}; {measured_memory.format_peak(self.resident_before)}")
        return exit_code

    def _fit(self) -> int:
        self.status.step = self.state.step
        self.status.write(RUNNING)
        while self.state.step < self.total_steps:
            if guard_error := self.validator.begin(self.engine, self.logger, self.state.step):
                raise guard_error
            for step in self._steps():
                if loss_spike.is_spike(self.state, step.loss, self.config.recovery) and self._rollback(step):
                    break
                self.logger.log_step(step)
                self.status.step = step.step
                if exit_code := self._after_step(step):
                    return exit_code
        self.checkpoints.wait()
        self.status.write(FINISHED, 0)
        return 0

    def _steps(self) -> Iterator[StepMetrics]:
        inputs = (self.engine, self.objective, self.loader, self.state, self.config, self.total_steps)
        steps = train_steps(*inputs, self.metrics_context, self.profiler.span)
        return self.profiler.follow(steps, self.state.step, self.total_steps)

    def _after_step(self, step: StepMetrics) -> int:
        """Validates, saves and handles stop requests. Returns the exit code where the run must stop early, or 0."""
        is_last = step.step == self.total_steps
        request = self.signals.poll(self.engine.device, self.checkpoints.failed)
        if request.failed:
            self.checkpoints.wait()
        stopping = request.stop and not is_last
        guard_error = None if stopping else self.validator.after(self.engine, self.logger, step.step)
        if stopping or request.save or guard_error or is_last or step.step % self.config.checkpoint.every == 0:
            self._save(step)
        if guard_error:
            self.checkpoints.wait()
            self.logger.log.info(f"a checkpoint was saved at step {step.step}")
            raise guard_error
        if not stopping:
            return 0
        self.checkpoints.wait()
        self.logger.log.info(
            f"stopped at step {step.step} ({self.signals.reason or 'requested on another rank'}), checkpoint saved; "
            "the same command resumes from it"
        )
        exit_code = EXIT_STOPPED if request.no_requeue else EXIT_INTERRUPTED
        self.status.write(STOPPED, exit_code, self.signals.reason)
        return exit_code

    def _save(self, step: StepMetrics) -> None:
        """Saves a checkpoint with the metrics of this step and its validation, if any (`checkpoint.best_metric`)."""
        newest = self.validator.newest
        validation_metrics = {
            key: value for key, value in newest.items() if key.startswith("validation/") and value is not None
        }
        metrics = replace(step, extra=step.extra | validation_metrics) if newest.get("step") == step.step else step
        best_metric = self.config.checkpoint.best_metric
        if (
            best_metric
            and best_metric not in metrics.as_dict()
            and not self._warned_best_metric
            and dist.get_rank() == 0
        ):
            self._warned_best_metric = True
            self.logger.log.warning(
                f"checkpoint.best_metric={best_metric}: not measured at step {step.step}, so this checkpoint cannot be "
                f"the best. Measured at steps: {', '.join(step.as_dict())}; at validations: "
                f"{', '.join(validation_metrics) or 'nothing'}"
            )
        self.logger.log_checkpoint(step.step, self.checkpoints.save(self.state, metrics))

    def _rollback(self, step: StepMetrics) -> bool:
        """Restores the newest checkpoint and skips the data since then. Returns False where there is no checkpoint.

        Raises:
            UserError: too many rollbacks, or too few data for the steps that remain.
        """
        self.checkpoints.wait()
        diverged, restored = self.state, self.checkpoints.restore_latest(self.logger.log.warning)
        if not restored.step:
            self.logger.log.warning(
                f"step {step.step}: loss {step.loss:.4f} is a spike, and there is no checkpoint to restore"
            )
            # The loss becomes part of the baseline of spike detection.
            diverged.recent_losses.append(step.loss)
            return False
        loss_spike.rollback(diverged, restored, self.config.recovery)
        # Checked on all ranks at the same step, because their loaders would run out of data at different steps.
        try:
            self.loader.require(self.total_steps + restored.skipped_batches)
        except UserError as error:
            raise error.within(
                f"step {diverged.step}: loss {step.loss:.4f} is a spike (recovery.rollback_above), and with "
                f"{restored.skipped_batches} steps of data skipped too few remain"
            ) from error
        self.logger.log.warning(
            f"step {step.step}: loss {step.loss:.4f} is a spike (recovery.rollback_above); rolled back to step "
            f"{restored.step}, the data of {diverged.step - restored.step} steps is skipped"
        )
        self.logger.rollback(restored.step)
        self.state = restored
        return True


def build_model(config: TrainConfig, hf_config: Any, precision: Precision) -> Any:
    """Builds the model with the packed forward pass, marks trainable parameters and restores weights of an earlier run.

    DeepSpeed creates its fp32 master weights from the model's dtype: weights trained by an earlier run are rounded to
    16 bits once where this run trains in 16 bits.
    """
    # ZeRO-3 shards parameters one by one: weights are read then.
    tuned = load_tuned_model(config, hf_config, precision, deferred=config.zero.stage == 3)
    model = fuse(tuned, packed=config.packing)
    init_from.restore_weights(model, Path(config.run_dir))
    add_embedding_noise(model, config.optim.neftune_noise_alpha)
    if config.hardware.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model
