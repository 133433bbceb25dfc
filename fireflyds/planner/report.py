"""How long a planned run is, what it writes, and how the plan is told."""

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

# Rows looked at for the lengths of documents and the share of labels.
_LOOKED_AT = 64
# What a plan takes from the cluster.
_MACHINE = (
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
    """What a row holds, on average, and how many steps there are; None where nothing says so."""

    steps: int | None
    rows_looked_at: int
    lengths: list[int]
    """Documents of the rows that were looked at."""
    labelled: int
    note: str

    @property
    def labelled_share(self) -> float:
        return self.labelled / sum(self.lengths)


@dataclass(frozen=True, slots=True)
class TrainingPlan:
    """All that is known of a run before it. `own` is what its configuration says, `choices` what else it could."""

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
        """The first that fits; they stand in order."""
        return next((choice for choice in self.choices if choice.fits), None)

    @property
    def best(self) -> Candidate:
        """What times are told of: the fastest, or where nothing fits the configuration's own."""
        return self.fastest or self.own

    @property
    def checkpoint_bytes(self) -> float:
        return checkpoint_bytes(self.shape)


def summarize_data(config: PlanConfig, fingerprint: str | None) -> DataSummary:
    """From the store, as training reads it; without one a row is one document in which every token is learned.

    `fingerprint` is that of the tokenizer, None where there is none to ask.
    """
    store_dir = config.data.store
    if store_dir and Path(store_dir, "manifest.json").is_file():
        tokenizer = config.model.tokenizer_path
        store = (
            TokenStore(store_dir)
            if fingerprint is None
            else open_store("data.store", store_dir, fingerprint, tokenizer)
        )
        rows = PackedRowSampler(store, config.seq_len, config.seed, config.data)
        steps = count_steps(config, rows)
        number = min(_LOOKED_AT, rows.rows_per_epoch)
        sampled = [rows.row(row) for row in range(number)]
        labelled = sum(collate(store, each).num_learned for each in sampled)
        lengths = [length for each in sampled for length in each.lengths.tolist()]
        return DataSummary(steps, number, lengths, labelled, "")
    missing = f"data.store={store_dir} is not there yet" if store_dir else "no data= given"
    how = f"{missing}: a row was taken as one document of seq_len={config.seq_len}, learned throughout"
    if config.optim.steps is None:
        how += f"; the steps of optim.epochs={config.optim.epochs:g} are not known without data"
    return DataSummary(config.optim.steps, 1, [config.seq_len], config.seq_len, f"note: {how}")


def cluster_precision(config: PlanConfig) -> Precision:
    """The number format that training would take on the cluster's GPUs.

    Raises:
        UserError: they do not have the one that is asked for.
    """
    asked, gpu = config.hardware.precision, config.cluster.gpu
    if config.cluster.on_cpu:
        return Precision.fp32 if asked is Precision.auto else asked
    has_bf16 = peak_flops(gpu, Precision.fp16, None) is None or peak_flops(gpu, Precision.bf16, None) is not None
    if asked is Precision.auto:
        return Precision.bf16 if has_bf16 else Precision.fp16
    if asked is Precision.bf16 and not has_bf16:
        raise UserError(f"hardware.precision=bf16: cluster.gpu={gpu} has no bf16. Use hardware.precision=fp16")
    return asked


def cluster_peak(config: PlanConfig, precision: Precision) -> float:
    """FLOP/s of one GPU at most.

    Raises:
        UserError: it is not known.
    """
    peak = peak_flops(config.cluster.gpu, precision, config.hardware.peak_tflops)
    if peak is None:
        raise UserError(
            f"cluster.gpu={config.cluster.gpu}: its peak in {precision.name} is not known. Give hardware.peak_tflops=<TFLOP/s>, or "
            f"one of {', '.join(known_gpus())}"
        )
    return peak


def checkpoint_bytes(shape: ModelShape) -> float:
    """Of one checkpoint: 32-bit weights and optimizer states of what trains, over all ranks; and of adapters and rows beside
    them what was learnt, in float32."""
    return 4 * shape.trained + shape.state_bytes + 4 * shape.adapters


def disk_bytes(each: float, config: PlanConfig, steps: int | None) -> float:
    """The most that checkpoints take: a new one is whole before the oldest beyond what is kept goes. Infinite where
    `checkpoint.keep_every` adds to them as long as nobody says how long the run is."""
    kept = config.checkpoint
    most: float = kept.keep + 1 + bool(kept.best_metric)
    if kept.keep_every:
        most += math.inf if steps is None else steps // math.lcm(kept.keep_every, kept.every)
    written = math.inf if steps is None else math.ceil(steps / kept.every)
    limit = math.inf if kept.max_gib is None else kept.max_gib * GIB + each
    return min(each * min(most, written), max(limit, 2 * each))


def _disk(each: float, config: PlanConfig, steps: int | None) -> str:
    kept, most = config.checkpoint, disk_bytes(each, config, steps)
    if math.isinf(most) and kept.keep_every:
        most = each * (kept.keep + 1 + bool(kept.best_metric))
        every = math.lcm(kept.keep_every, kept.every)
        return f"{most / GIB:.2f} GiB of a run, and it grows by one every {every:,} steps (checkpoint.keep_every)"
    limit = "" if kept.max_gib is None else f", checkpoint.max_gib={kept.max_gib:g}"
    return f"{most / GIB:.2f} GiB at most (checkpoint.keep={kept.keep}{limit})"


def make_plan(
    config: PlanConfig, shape: ModelShape, flops: StepFlops, precision: Precision, data: DataSummary
) -> TrainingPlan:
    """Everything about a run.

    Raises:
        UserError: the peak of the GPU is not known, or they do not divide the global batch.
    """
    peak = cluster_peak(config, precision)
    work = choices.step_cost(flops, shape, config.global_batch_size / data.rows_looked_at, data.lengths, data.labelled)
    given = (shape, config, precision, work, peak, data.labelled_share)
    found = choices.all_candidates(*given)
    world_size = config.cluster.world_size
    own = choices.evaluate_candidate(*given, placement_of(config, world_size, config.accumulation_steps(world_size)))
    return TrainingPlan(config, shape, precision, peak, data, work, own, found)


def as_json(plan: TrainingPlan, notes: list[str]) -> dict[str, Any]:
    """The plan for programs. Sizes in bytes, times in seconds; `memory_per_gpu` and disk are those of the
    configuration itself (null where it grows with the steps and nobody knows how many), hours and tokens/s those of the
    fastest choice that fits, where one does."""
    config, data, best, steps = plan.config, plan.data, plan.best, plan.data.steps
    disk = disk_bytes(plan.checkpoint_bytes, config, steps)
    return {
        "cluster": {name: getattr(config.cluster, name) for name in _MACHINE},
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
        "own": _told(plan.own, plan.work),
        "fastest": None if plan.fastest is None else _told(plan.fastest, plan.work),
        "choices": [_told(choice, plan.work) for choice in plan.choices],
        "notes": [*filter(None, [data.note]), *notes],
    }


def _told(choice: Candidate, work: StepCost) -> dict[str, Any]:
    where = choice.where
    return {
        "stage": where.stage,
        "offload": choice.offload,
        "micro_batch_size": where.micro_batch_size,
        "gradient_accumulation_steps": where.accumulation,
        "gradient_checkpointing": where.checkpointing,
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
    """The plan for people."""
    config, data, own, each = plan.config, plan.data, plan.own, plan.checkpoint_bytes
    cluster = config.cluster
    gpus = f"{cluster.world_size} x {cluster.gpu} ({cluster.gpu_memory_gib:g} GiB), {plan.precision.name}"
    lines = [f"\n{gpus}, {plan.peak / 1e12:g} TFLOP/s at most, MFU {cluster.mfu:.0%} expected", _length(plan)]
    lines.append(f"checkpoint: {each / GIB:.2f} GiB on disk, {_disk(each, config, data.steps)}")
    unit = choices.units(cluster)[:-1]
    lines += ["", f"GiB per {unit} at the moment of a step that needs most, host GiB per machine:", _head()]
    lines += [_row(choice, plan.work, choice is plan.fastest) for choice in plan.choices if choice.fits]
    refused = [choice for choice in plan.choices if not choice.fits]
    if refused:
        least = min(refused, key=lambda choice: choice.memory.total)
        lines.append(
            f"{len(refused)} further choices do not fit; the smallest of them: {_name(least)}, {least.why_not}"
        )
    lines += ["", f"as configured ({_name(own)}): {f'does not fit: {own.why_not}' if own.why_not else 'fits'}"]
    lines += [_head(), _row(own, plan.work, False)]
    lines.append(f"fastest: {_name(plan.fastest)}" if plan.fastest else f"fastest: {_nothing(config)}")
    return "\n".join([*lines, *filter(None, [data.note]), *notes])


def _nothing(config: PlanConfig) -> str:
    smaller = "tuning=qlora, " if config.tuning.method is not TuningMethod.qlora else ""
    larger = "machines or memory" if config.cluster.on_cpu else "or larger GPUs"
    return f"nothing fits. Give more {larger} (cluster.*), or try {smaller}a shorter seq_len, tuning.head=frozen"


def _length(plan: TrainingPlan) -> str:
    config, data, work, best = plan.config, plan.data, plan.work, plan.best
    speed = f"{work.tokens / best.seconds:,.0f} tokens/s"
    if data.steps is None:
        return f"a step: {work.tokens:,.0f} tokens, {work.flops:.3g} FLOPs, {best.seconds:.2f} s, {speed}"
    hours = best.seconds * data.steps / 3600
    return (
        f"{data.steps:,} steps of {config.global_batch_size} rows, {work.tokens * data.steps:,.0f} tokens, "
        f"{work.flops * data.steps:.3g} FLOPs: {hours:.2f} hours at {speed}"
    )


def _name(choice: Candidate) -> str:
    where = choice.where
    checkpointing = "with" if where.checkpointing else "without"
    return f"zero={where.stage}, offload {choice.offload}, micro_batch_size={where.micro_batch_size}, {checkpointing} checkpointing"


_ITEMS = ("weights", "gradients", "optimizer", "activations", "logits", "buffers")


def _head() -> str:
    names = "".join(f"{name:>12}" for name in (*_ITEMS, "total"))
    return f"{'zero':<5}{'offload':<16}{'micro':>5}{'ckpt':>5}{names}{'host':>8}{'s/step':>9}{'tokens/s':>11}  moment"


def _row(choice: Candidate, work: StepCost, best: bool) -> str:
    where, items = choice.where, choice.memory.items
    sizes = "".join(f"{items[name] / GIB:>12.2f}" for name in _ITEMS) + f"{choice.memory.total / GIB:>12.2f}"
    checkpointing = "yes" if where.checkpointing else "no"
    return (
        f"{where.stage:<5}{choice.offload:<16}{where.micro_batch_size:>5}{checkpointing:>5}{sizes}"
        f"{choice.host_per_node / GIB:>8.0f}{choice.seconds:>9.2f}{work.tokens / choice.seconds:>11,.0f}  {choice.memory.moment}{', fastest' * best}"
    )
