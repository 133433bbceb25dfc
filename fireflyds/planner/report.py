"""Duration, FLOPs and disk usage of a planned run, and the plan as text and as JSON."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fireflyds.config import PlanConfig, Precision, TuningMethod
from fireflyds.data.pack.loader import collate
from fireflyds.data.pack.mixture import PackedRowSampler, count_steps
from fireflyds.data.store.store import TokenStore, open_store
from fireflyds.errors import UserError
from fireflyds.metrics.flops import StepFlops, known_gpus, peak_flops
from fireflyds.planner import search as choices
from fireflyds.planner.memory import GIB, placement_of
from fireflyds.planner.model_shape import ModelShape
from fireflyds.planner.search import Candidate, StepCost

# Rows sampled to estimate the lengths of documents and the share of tokens with a label.
_SAMPLED_ROWS = 64
# Fields of `cluster` that are part of the JSON output.
_CLUSTER_FIELDS = (
    "gpu",
    "nodes",
    "gpus_per_node",
    "gpu_memory_gib",
    "host_memory_gib",
    "mfu",
    "link_gb_per_s",
    "host_link_gb_per_s",
)


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
    """Bytes of one checkpoint over all ranks: float32 master weights and optimizer states of the trainable parameters;
    unless `tuning=full`, also the trained weights in float32, which are saved in addition."""
    return 4 * shape.trained + shape.state_bytes + 4 * shape.adapters


def disk_bytes(each: float, config: PlanConfig, steps: int | None) -> float:
    """Peak disk usage of all checkpoints in bytes; `each`: bytes of one checkpoint. A new checkpoint is complete before
    the oldest surplus one is deleted. Infinite if `checkpoint.keep_every` adds checkpoints and `steps` is unknown."""
    checkpoint = config.checkpoint
    max_count: float = checkpoint.keep + 1 + bool(checkpoint.best_metric)
    if checkpoint.keep_every:
        max_count += math.inf if steps is None else steps // math.lcm(checkpoint.keep_every, checkpoint.every)
    num_written = math.inf if steps is None else math.ceil(steps / checkpoint.every)
    byte_limit = math.inf if checkpoint.max_gib is None else checkpoint.max_gib * GIB + each
    return min(each * min(max_count, num_written), max(byte_limit, 2 * each))


def _format_disk(checkpoint_size: float, config: PlanConfig, steps: int | None) -> str:
    checkpoint, total = config.checkpoint, disk_bytes(checkpoint_size, config, steps)
    if math.isinf(total) and checkpoint.keep_every:
        total = checkpoint_size * (checkpoint.keep + 1 + bool(checkpoint.best_metric))
        every = math.lcm(checkpoint.keep_every, checkpoint.every)
        return f"{total / GIB:.2f} GiB per run plus one checkpoint every {every:,} steps (checkpoint.keep_every)"
    limit = "" if checkpoint.max_gib is None else f", checkpoint.max_gib={checkpoint.max_gib:g}"
    return f"{total / GIB:.2f} GiB at most (checkpoint.keep={checkpoint.keep}{limit})"


def make_plan(
    config: PlanConfig, shape: ModelShape, flops: StepFlops, precision: Precision, data: DataSummary
) -> TrainingPlan:
    """Computes the plan of a run.

    Raises:
        UserError: the peak of the GPU is not known, or the global batch is not a multiple of the number of GPUs.
    """
    peak = cluster_peak(config, precision)
    work = choices.step_cost(flops, shape, config.global_batch_size / data.rows_looked_at, data.lengths, data.labelled)
    arguments = (shape, config, precision, work, peak, data.labelled_share)
    candidates = choices.all_candidates(*arguments)
    world_size = config.cluster.world_size
    configured = choices.evaluate_candidate(
        *arguments, placement_of(config, world_size, config.accumulation_steps(world_size))
    )
    return TrainingPlan(config, shape, precision, peak, data, work, configured, candidates)


def as_json(plan: TrainingPlan, notes: list[str]) -> dict[str, Any]:
    """The plan as a JSON object. Sizes in bytes, times in seconds. `memory_per_gpu` and `disk_of_run` are those of the
    configured layout (disk: null where it grows with an unknown number of steps), `hours` and `tokens_per_second` those
    of the fastest candidate that fits, or of the configured one if none fits."""
    config, data, best, steps = plan.config, plan.data, plan.best, plan.data.steps
    disk = disk_bytes(plan.checkpoint_bytes, config, steps)
    return {
        "cluster": {name: getattr(config.cluster, name) for name in _CLUSTER_FIELDS},
        "precision": plan.precision.name,
        "steps": steps,
        "tokens_per_step": plan.work.tokens,
        "tokens": None if steps is None else plan.work.tokens * steps,
        "flops_per_step": plan.work.flops,
        "flops": None if steps is None else plan.work.flops * steps,
        "peak_flops_per_gpu": plan.peak,
        "mfu": config.cluster.mfu,
        "hours": None if steps is None else best.seconds * steps / 3600,
        "tokens_per_second": plan.work.tokens / best.seconds,
        "disk_per_checkpoint": plan.checkpoint_bytes,
        "disk_of_run": None if math.isinf(disk) else disk,
        "memory_per_gpu": plan.own.memory.items | {"total": plan.own.memory.total},
        "host_memory_per_node": plan.own.host_per_node,
        "own": _candidate_json(plan.own, plan.work),
        "fastest": None if plan.fastest is None else _candidate_json(plan.fastest, plan.work),
        "choices": [_candidate_json(choice, plan.work) for choice in plan.choices],
        "notes": [*filter(None, [data.note]), *notes],
    }


def _candidate_json(choice: Candidate, work: StepCost) -> dict[str, Any]:
    placement = choice.where
    return {
        "stage": placement.stage,
        "offload": choice.offload,
        "micro_batch_size": placement.micro_batch_size,
        "gradient_accumulation_steps": placement.accumulation,
        "gradient_checkpointing": placement.checkpointing,
        "fits": choice.fits,
        "why_not": choice.why_not,
        "memory_per_gpu": choice.memory.items | {"total": choice.memory.total},
        "moment": choice.memory.moment,
        "highest_of_each": choice.memory.highest,
        "host_memory_per_node": choice.host_per_node,
        "seconds_per_step": choice.seconds,
        "compute_seconds": choice.compute_seconds,
        "communication_seconds": choice.communication_seconds,
        "offload_seconds": choice.offload_seconds,
        "tokens_per_second": work.tokens / choice.seconds,
    }


def format_plan(plan: TrainingPlan, notes: list[str]) -> str:
    """The plan as text."""
    config, data, configured, checkpoint_size = plan.config, plan.data, plan.own, plan.checkpoint_bytes
    cluster = config.cluster
    gpus = f"{cluster.world_size} x {cluster.gpu} ({cluster.gpu_memory_gib:g} GiB), {plan.precision.name}"
    lines = [f"\n{gpus}, {plan.peak / 1e12:g} TFLOP/s at most, MFU {cluster.mfu:.0%} expected", _format_duration(plan)]
    lines.append(
        f"checkpoint: {checkpoint_size / GIB:.2f} GiB on disk, {_format_disk(checkpoint_size, config, data.steps)}"
    )
    unit = choices.units(cluster)[:-1]
    lines += ["", f"peak GiB per {unit} within a step, host GiB per machine:", _table_header()]
    lines += [_table_row(choice, plan.work, choice is plan.fastest) for choice in plan.choices if choice.fits]
    rejected = [choice for choice in plan.choices if not choice.fits]
    if rejected:
        smallest = min(rejected, key=lambda choice: choice.memory.total)
        lines.append(
            f"{len(rejected)} further layouts do not fit; the smallest of them: {_describe_candidate(smallest)}, {smallest.why_not}"
        )
    lines += [
        "",
        f"as configured ({_describe_candidate(configured)}): {f'does not fit: {configured.why_not}' if configured.why_not else 'fits'}",
    ]
    lines += [_table_header(), _table_row(configured, plan.work, False)]
    lines.append(
        f"fastest: {_describe_candidate(plan.fastest)}" if plan.fastest else f"fastest: {_format_nothing_fits(config)}"
    )
    return "\n".join([*lines, *filter(None, [data.note]), *notes])


def _format_nothing_fits(config: PlanConfig) -> str:
    smaller = "tuning=qlora, " if config.tuning.method is not TuningMethod.qlora else ""
    larger = "machines or memory" if config.cluster.on_cpu else "or larger GPUs"
    return f"nothing fits. Give more {larger} (cluster.*), or try {smaller}a shorter seq_len, tuning.head=frozen"


def _format_duration(plan: TrainingPlan) -> str:
    config, data, work, best = plan.config, plan.data, plan.work, plan.best
    speed = f"{work.tokens / best.seconds:,.0f} tokens/s"
    if data.steps is None:
        return f"a step: {work.tokens:,.0f} tokens, {work.flops:.3g} FLOPs, {best.seconds:.2f} s, {speed}"
    hours = best.seconds * data.steps / 3600
    return (
        f"{data.steps:,} steps of {config.global_batch_size} rows, {work.tokens * data.steps:,.0f} tokens, "
        f"{work.flops * data.steps:.3g} FLOPs: {hours:.2f} hours at {speed}"
    )


def _describe_candidate(choice: Candidate) -> str:
    placement = choice.where
    checkpointing = "with" if placement.checkpointing else "without"
    return f"zero={placement.stage}, offload {choice.offload}, micro_batch_size={placement.micro_batch_size}, {checkpointing} checkpointing"


_ITEMS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


def _table_header() -> str:
    names = "".join(f"{name:>12}" for name in (*_ITEMS, "total"))
    return f"{'zero':<5}{'offload':<16}{'micro':>5}{'ckpt':>5}{names}{'host':>8}{'s/step':>9}{'tokens/s':>11}  phase"


def _table_row(choice: Candidate, work: StepCost, is_fastest: bool) -> str:
    placement, items = choice.where, choice.memory.items
    sizes = "".join(f"{items[name] / GIB:>12.2f}" for name in _ITEMS) + f"{choice.memory.total / GIB:>12.2f}"
    checkpointing = "yes" if placement.checkpointing else "no"
    return (
        f"{placement.stage:<5}{choice.offload:<16}{placement.micro_batch_size:>5}{checkpointing:>5}{sizes}"
        f"{choice.host_per_node / GIB:>8.0f}{choice.seconds:>9.2f}{work.tokens / choice.seconds:>11,.0f}  {choice.memory.moment}{', fastest' * is_fastest}"
    )
