"""The plan as text and as JSON."""

import math
from typing import Any

from fireflyds.config import PlanConfig, TuningMethod
from fireflyds.planner import search
from fireflyds.planner.memory import GIB, ITEMS
from fireflyds.planner.plan import TrainingPlan, disk_bytes
from fireflyds.planner.search import Candidate, StepCost

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


def _format_disk(checkpoint_size: float, config: PlanConfig, steps: int | None) -> str:
    checkpoint, total = config.checkpoint, disk_bytes(checkpoint_size, config, steps)
    if math.isinf(total) and checkpoint.keep_every:
        total = checkpoint_size * (checkpoint.keep + 1 + bool(checkpoint.best_metric))
        every = math.lcm(checkpoint.keep_every, checkpoint.every)
        return f"{total / GIB:.2f} GiB per run plus one checkpoint every {every:,} steps (checkpoint.keep_every)"
    limit = "" if checkpoint.max_gib is None else f", checkpoint.max_gib={checkpoint.max_gib:g}"
    return f"{total / GIB:.2f} GiB at most (checkpoint.keep={checkpoint.keep}{limit})"


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
    placement = choice.placement
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
    unit = search.units(cluster)[:-1]
    lines += ["", f"peak GiB per {unit} within a step, host GiB per machine:", _table_header()]
    lines += [_table_row(choice, plan.work, choice is plan.fastest) for choice in plan.choices if choice.fits]
    rejected = [choice for choice in plan.choices if not choice.fits]
    if rejected:
        smallest = min(rejected, key=lambda choice: choice.memory.total)
        lines.append(
            f"{len(rejected)} further layouts do not fit; the smallest of them: {_describe_candidate(smallest)}, "
            f"{smallest.why_not}"
        )
    lines += [
        "",
        f"as configured ({_describe_candidate(configured)}): "
        f"{f'does not fit: {configured.why_not}' if configured.why_not else 'fits'}",
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
    placement = choice.placement
    checkpointing = "with" if placement.checkpointing else "without"
    return (
        f"zero={placement.stage}, offload {choice.offload}, micro_batch_size={placement.micro_batch_size}, "
        f"{checkpointing} checkpointing"
    )


# The fixed part stands only in the total.
_TABLE_ITEMS = tuple(item for item in ITEMS if item != "fixed")


def _table_header() -> str:
    names = "".join(f"{name:>12}" for name in (*_TABLE_ITEMS, "total"))
    return f"{'zero':<5}{'offload':<16}{'micro':>5}{'ckpt':>5}{names}{'host':>8}{'s/step':>9}{'tokens/s':>11}  phase"


def _table_row(choice: Candidate, work: StepCost, is_fastest: bool) -> str:
    placement, items = choice.placement, choice.memory.items
    sizes = "".join(f"{items[name] / GIB:>12.2f}" for name in _TABLE_ITEMS) + f"{choice.memory.total / GIB:>12.2f}"
    checkpointing = "yes" if placement.checkpointing else "no"
    return (
        f"{placement.stage:<5}{choice.offload:<16}{placement.micro_batch_size:>5}{checkpointing:>5}{sizes}"
        f"{choice.host_per_node / GIB:>8.0f}{choice.seconds:>9.2f}{work.tokens / choice.seconds:>11,.0f}  "
        f"{choice.memory.moment}{', fastest' * is_fastest}"
    )
