"""Parameters by what they are, each group with its own learning rate and weight decay; and the table of what trains."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from fireflyds.config import OptimConfig, Precision, TrainConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.optim.optimizers import ParamGroup, load_optimizer_spec

# NF4: blocks of 64 with an 8-bit scale, and a 32-bit scale for 256 of these (QLoRA's 4.127 bits).
QUANTISED_BYTES = {4: 0.5 + (1 + 4 / 256) / 64, 8: 1.0}


def parameter_groups(model: Any, config: TrainConfig) -> list[ParamGroup]:
    """Every trained parameter in one group: matrices of the body, norms, biases, embeddings, head, parts of adapters.

    A tied head counts as embeddings.

    Raises:
        UserError: a setting of a group in which nothing trains.
    """
    optim = config.optim
    matrices_apart = load_optimizer_spec(optim.name).treats_matrices_apart
    groups = [
        ParamGroup("matrices", optim.muon_lr if matrices_apart else optim.lr, optim.weight_decay, matrices_apart),
        ParamGroup("lora_A", optim.lr, optim.weight_decay),
        ParamGroup("lora_B", optim.lr * config.tuning.loraplus_lr_ratio, optim.weight_decay),
        ParamGroup("lora_magnitude", optim.lr, 0.0),
        *(_group_from_config(optim, name) for name in ("embeddings", "head", "norms", "biases")),
    ]
    by_name = {group.name: group for group in groups}
    embeddings = {id(parameter) for parameter in model.get_input_embeddings().parameters()}
    head = {id(parameter) for parameter in model.get_output_embeddings().parameters()}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            in_embeddings, in_head = id(parameter) in embeddings, id(parameter) in head
            by_name[_group_name(name, parameter, in_embeddings, in_head)].parameters.append(parameter)
    if matrices_apart and not by_name["matrices"].parameters:
        raise UserError(f"optim={optim.name}: no matrix of the body trains, so it would train nothing. Use optim=adamw")
    _refuse_unused(optim, by_name)
    return [group for group in groups if group.parameters]


def _refuse_unused(optim: OptimConfig, by_name: dict[str, ParamGroup]) -> None:
    for name in ("embeddings", "head", "norms", "biases"):
        for key in ("lr", "weight_decay"):
            value = getattr(getattr(optim, name), key)
            if value is not None and not by_name[name].parameters:
                raise UserError(
                    f"optim.{name}.{key}={value}: no parameter of that group trains (a tied head is embeddings). Leave it "
                    f"out (optim.{name}.{key}=null), or let tuning.* train them"
                )


def _group_from_config(optim: OptimConfig, name: str) -> ParamGroup:
    own = getattr(optim, name)
    decay = 0.0 if name in ("norms", "biases") else optim.weight_decay
    return ParamGroup(
        name, optim.lr if own.lr is None else own.lr, decay if own.weight_decay is None else own.weight_decay
    )


def _group_name(name: str, parameter: nn.Parameter, in_embeddings: bool, in_head: bool) -> str:
    for adapter in ("lora_A", "lora_B", "lora_magnitude"):
        if f".{adapter}" in name:
            return adapter
    if name.endswith(".bias"):
        return "biases"
    if in_embeddings:
        return "embeddings"
    if in_head:
        return "head"
    return "matrices" if parameter.dim() > 1 else "norms"


@dataclass(frozen=True, slots=True)
class ParamGroupSummary:
    """A line of the table. `memory_bytes`: weights, gradients, 32-bit masters and optimizer states over all ranks, before
    ZeRO spreads them; activations come on top."""

    group: str
    parameters: int
    lr: float | None
    weight_decay: float | None
    dtype: str
    memory_bytes: int


def summarize_groups(model: Any, config: TrainConfig, precision: Precision) -> list[ParamGroupSummary]:
    """A row for each group, and as the last one what is frozen."""
    wide = 4 if precision is Precision.fp32 else 2
    rows = []
    for group in parameter_groups(model, config):
        state = load_optimizer_spec(config.optim.name).state_bytes_of(group)
        # In float32 ZeRO keeps a copy of the weights as masters too.
        masters = 4 if wide == 2 or config.zero.stage else 0
        each = 2 * wide + masters + state
        number = group.num_parameters
        rows.append(ParamGroupSummary(group.name, number, group.lr, group.weight_decay, precision.name, each * number))
    rows.append(_frozen(model, config, precision.name, wide))
    return rows


def _frozen(model: Any, config: TrainConfig, precision: str, wide: int) -> ParamGroupSummary:
    """The body's linear layers are quantised under QLoRA, also where the model is a bare one that only will be."""
    quantised = plain = 0
    head = model.get_output_embeddings()
    packed = {
        id(module.weight) for module in model.modules()
        if isinstance(module, nn.Linear) and module is not head and config.tuning.method is TuningMethod.qlora
    }  # fmt: skip
    for parameter in model.parameters():
        if not parameter.requires_grad and id(parameter) in packed:
            quantised += logical_numel(parameter)
        elif not parameter.requires_grad:
            plain += parameter.numel()
    kinds = [("nf4" if config.tuning.bits == 4 else "int8")] * bool(quantised) + [precision] * bool(plain)
    held = round(quantised * QUANTISED_BYTES[config.tuning.bits] + plain * wide)
    return ParamGroupSummary("frozen", quantised + plain, None, None, "+".join(kinds), held)


def logical_numel(parameter: Any) -> int:
    """A 4-bit weight counts what it stands for."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """All parameters and those that train."""
    each = [(logical_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(number for number, _ in each), sum(number for number, trains in each if trains)


def format_groups(rows: list[ParamGroupSummary]) -> str:
    """Rows for people to read."""
    lines = [f"{'group':<15}{'parameters':>16}{'lr':>10}{'decay':>8}  {'dtype':<10}{'memory':>10}"]
    for row in rows:
        if row.parameters:
            lr, decay = ("-" if value is None else f"{value:g}" for value in (row.lr, row.weight_decay))
            scale, unit = (2**30, "GiB") if row.memory_bytes >= 2**27 else (2**20, "MiB")
            memory = f"{row.memory_bytes / scale:.{2 if unit == 'GiB' else 1}f} {unit}"
            lines.append(f"{row.group:<15}{row.parameters:>16,}{lr:>10}{decay:>8}  {row.dtype:<10}{memory:>10}")
    return "\n".join(lines)
