"""The plan of a run: its steps, FLOPs, disk usage, and the layouts that fit, fastest first."""

import math
from dataclasses import dataclass
from pathlib import Path

from fireflyds.config import PlanConfig, Precision
from fireflyds.data.pack.loader import collate
from fireflyds.data.pack.mixture import PackedRowSampler, count_steps
from fireflyds.data.store.store import TokenStore, open_store
from fireflyds.errors import UserError
from fireflyds.metrics.flops import StepFlops, known_gpus, peak_flops
from fireflyds.planner import search
from fireflyds.planner.memory import GIB, placement_of
from fireflyds.planner.model_shape import ModelShape
from fireflyds.planner.search import Candidate, StepCost

# Rows sampled to estimate the lengths of documents and the share of tokens with a label.
_SAMPLED_ROWS = 64


@dataclass(frozen=True, slots=True)
class DataSummary:
    """Number of steps (None where unknown), and lengths and labels of the documents in sampled rows."""

    steps: int | None
    rows_looked_at: int
    lengths: list[int]
    """Tokens of each document in the sampled rows."""
    labelled: int
    """Tokens with a label in the sampled rows."""
    note: str

    @property
    def labelled_share(self) -> float:
        """Labelled tokens as a fraction of all tokens."""
        return self.labelled / sum(self.lengths)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """Estimates for a run. `own` is the layout of its configuration, `choices` are all layouts, best first."""

    config: PlanConfig
    shape: ModelShape
    precision: Precision
    peak: float
    """FLOP/s of one GPU."""
    data: DataSummary
    work: StepCost
    own: Candidate
    choices: list[Candidate]

    @property
    def fastest(self) -> Candidate | None:
        """The first candidate that fits (`choices` is sorted), None if none fits."""
        return next((choice for choice in self.choices if choice.fits), None)

    @property
    def best(self) -> Candidate:
        """The candidate that times are reported for: the fastest, or the configured one if none fits."""
        return self.fastest or self.own

    @property
    def checkpoint_bytes(self) -> float:
        """Size of a checkpoint, in bytes."""
        return checkpoint_bytes(self.shape)


def summarize_data(config: PlanConfig, fingerprint: str | None) -> DataSummary:
    """Summarizes packed rows of the token store; without a store, a row is one document with a label for every token.

    `fingerprint`: fingerprint of the tokenizer, None where no tokenizer is available to check the store against.
    """
    store_dir = config.data.store
    if store_dir and Path(store_dir, "manifest.json").is_file():
        tokenizer = config.model.tokenizer_path
        store = (
            TokenStore(store_dir)
            if fingerprint is None
            else open_store("data.store", store_dir, fingerprint, tokenizer)
        )
        sampler = PackedRowSampler(store, config.seq_len, config.seed, config.data)
        steps = count_steps(config, sampler)
        num_rows = min(_SAMPLED_ROWS, sampler.rows_per_epoch)
        sampled = [sampler.row(index) for index in range(num_rows)]
        labelled = sum(collate(store, packed_row).num_learned for packed_row in sampled)
        lengths = [length for packed_row in sampled for length in packed_row.lengths.tolist()]
        return DataSummary(steps, num_rows, lengths, labelled, "")
    missing = f"data.store={store_dir} does not exist yet" if store_dir else "no data= given"
    message = f"{missing}: a row is assumed to be one document of seq_len={config.seq_len} with a label for every token"
    if config.optim.steps is None:
        message += f"; the steps of optim.epochs={config.optim.epochs:g} are not known without data"
    return DataSummary(config.optim.steps, 1, [config.seq_len], config.seq_len, f"note: {message}")


def cluster_precision(config: PlanConfig) -> Precision:
    """The number format that training uses on the cluster's GPUs.

    Raises:
        UserError: the GPUs do not support the configured number format.
    """
    requested, gpu = config.hardware.precision, config.cluster.gpu
    if config.cluster.on_cpu:
        return Precision.fp32 if requested is Precision.auto else requested
    has_bf16 = peak_flops(gpu, Precision.fp16, None) is None or peak_flops(gpu, Precision.bf16, None) is not None
    if requested is Precision.auto:
        return Precision.bf16 if has_bf16 else Precision.fp16
    if requested is Precision.bf16 and not has_bf16:
        raise UserError(
            f"cluster.gpu={gpu} has no bf16",
            key="hardware.precision",
            value="bf16",
            remedy="Use hardware.precision=fp16",
        )
    return requested


def cluster_peak(config: PlanConfig, precision: Precision) -> float:
    """Peak FLOP/s of one GPU.

    Raises:
        UserError: the peak of this GPU is not known.
    """
    peak = peak_flops(config.cluster.gpu, precision, config.hardware.peak_tflops)
    if peak is None:
        raise UserError(
            f"its peak in {precision.name} is not known",
            key="cluster.gpu",
            value=config.cluster.gpu,
            remedy=f"Give hardware.peak_tflops=<TFLOP/s>, or one of {', '.join(known_gpus())}",
        )
    return peak


def checkpoint_bytes(shape: ModelShape) -> float:
    """Bytes of one checkpoint over all ranks: float32 master weights and optimizer states of the trainable
    parameters."""
    return 4 * shape.trained + shape.state_bytes


def disk_bytes(checkpoint_bytes: float, config: PlanConfig, steps: int | None) -> float:
    """Peak disk usage of all checkpoints in bytes; `each`: bytes of one checkpoint. A new checkpoint is complete before
    the oldest surplus one is deleted. Infinite if `checkpoint.keep_every` adds checkpoints and `steps` is unknown."""
    checkpoint = config.checkpoint
    max_count: float = checkpoint.keep + 1 + bool(checkpoint.best_metric)
    if checkpoint.keep_every:
        max_count += math.inf if steps is None else steps // math.lcm(checkpoint.keep_every, checkpoint.every)
    num_written = math.inf if steps is None else math.ceil(steps / checkpoint.every)
    byte_limit = math.inf if checkpoint.max_gib is None else checkpoint.max_gib * GIB + checkpoint_bytes
    return min(checkpoint_bytes * min(max_count, num_written), max(byte_limit, 2 * checkpoint_bytes))


def make_plan(
    config: PlanConfig, shape: ModelShape, flops: StepFlops, precision: Precision, data: DataSummary
) -> TrainingPlan:
    """Computes the plan of a run.

    Raises:
        UserError: the peak of the GPU is not known, or the global batch is not a multiple of the number of GPUs.
    """
    peak = cluster_peak(config, precision)
    work = search.step_cost(flops, shape, config.global_batch_size / data.rows_looked_at, data.lengths, data.labelled)
    arguments = (shape, config, precision, work, peak, data.labelled_share)
    candidates = search.all_candidates(*arguments)
    world_size = config.cluster.world_size
    configured = search.evaluate_candidate(
        *arguments, placement_of(config, world_size, config.accumulation_steps(world_size))
    )
    return TrainingPlan(config, shape, precision, peak, data, work, configured, candidates)
