"""Log messages that summarize a run at its start."""

from typing import Any

from fireflyds.optim.param_groups import format_groups, notes_on_experts, summarize_groups
from fireflyds.train.run_inputs import RunInputs
from fireflyds.types import TrainState


def describe_run(inputs: RunInputs, model: Any, world_size: int) -> str:
    """Summarizes model, data and schedule in two lines, then the parameter groups and what adapters leave out."""
    config, store, rows = inputs.config, inputs.store, inputs.rows
    groups = summarize_groups(model, config, inputs.precision)
    total = sum(group.parameters for group in groups)
    trainable = total - groups[-1].parameters
    continued, cut_tokens = rows.long_dialogues
    notes = ""
    if continued:
        notes += f", {continued:,} dialogues longer than seq_len={config.seq_len} go on in further rows"
        notes += f" ({cut_tokens:,} tokens of their prompts cut)" * bool(cut_tokens)
    mixed = [name for name in rows.names if name != "all"]
    if mixed and (unmixed := sorted(set(store.domains) - set(mixed))):
        notes += f"; without weight, so not trained on: {', '.join(unmixed)}"
    return (
        f"{config.run}: {config.tuning.method.name}, {trainable:,} of {total:,} parameters train, "
        f"ZeRO-{config.zero.stage}, "
        f"{inputs.precision.name}\n"
        f"{len(store):,} documents, {store.num_tokens:,} tokens, {rows.rows_per_epoch:,} rows an epoch{notes}; "
        f"{inputs.total_steps:,} steps of {config.global_batch_size} rows = {world_size} ranks x "
        f"{config.micro_batch_size} x "
        f"{inputs.accumulation} accumulated\n"
    ) + "\n".join([format_groups(groups), *notes_on_experts(model, config)])


def describe_start(state: TrainState, steps: int) -> str:
    """Describes the step at which a run starts or resumes."""
    if not state.step:
        return f"starts at the first of {steps} steps"
    suffix = "" if state.step < steps else "; nothing left to do"
    return f"resumed at step {state.step} of {steps} ({state.tokens:,} tokens){suffix}"
