"""Parameter groups, each with its own learning rate and weight decay, and the printed summary of them."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from fireflyds.config import OptimConfig, Precision, TrainConfig, TuningMethod
from fireflyds.errors import UserError
from fireflyds.models.architecture import LINEAR, expert_parameters
from fireflyds.models.packed.routing import has_router_losses
from fireflyds.optim.optimizers import ParamGroup, load_optimizer_spec

# Bytes per parameter, by bits. NF4: an 8-bit scale per block of 64, and a 32-bit scale per 256 of these (4.127 bits).
QUANTISED_BYTES = {4: 0.5 + (1 + 4 / 256) / 64, 8: 1.0}


def parameter_groups(model: Any, config: TrainConfig) -> list[ParamGroup]:
    """Assigns every trainable parameter to one group, and returns the groups that are not empty.

    Groups: matrices of the body, norms, biases, embeddings, head, LoRA A, LoRA B, DoRA magnitudes. A tied head belongs
    to the embeddings.

    Raises:
        UserError: a setting of a group without trainable parameters.
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
        raise UserError(
            "no matrix of the body trains, so it has no parameters",
            key="optim",
            value=optim.name,
            remedy="Use optim=adamw",
        )
    _check_unused_settings(optim, by_name)
    return [group for group in groups if group.parameters]


def _check_unused_settings(optim: OptimConfig, by_name: dict[str, ParamGroup]) -> None:
    """Raises `UserError` where `optim.<group>` sets a value for a group without parameters."""
    for name in ("embeddings", "head", "norms", "biases"):
        for key in ("lr", "weight_decay"):
            value = getattr(getattr(optim, name), key)
            if value is not None and not by_name[name].parameters:
                raise UserError(
                    "no parameter of that group trains (a tied head is embeddings)",
                    key=f"optim.{name}.{key}",
                    value=value,
                    remedy=f"Remove it (optim.{name}.{key}=null), or make them trainable with tuning.*",
                )


def _group_from_config(optim: OptimConfig, name: str) -> ParamGroup:
    group = getattr(optim, name)
    decay = 0.0 if name in ("norms", "biases") else optim.weight_decay
    return ParamGroup(
        name, optim.lr if group.lr is None else group.lr, decay if group.weight_decay is None else group.weight_decay
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
    """A row of the summary.

    `memory_bytes`: weights, gradients, 32-bit master weights and optimizer states of one replica, before ZeRO
    partitions them; without activations.
    """

    group: str
    parameters: int
    lr: float | None
    weight_decay: float | None
    dtype: str
    memory_bytes: int


def summarize_groups(model: Any, config: TrainConfig, precision: Precision) -> list[ParamGroupSummary]:
    """Returns one row per parameter group, and a last one for the frozen parameters."""
    width = 4 if precision is Precision.fp32 else 2
    rows = []
    for group in parameter_groups(model, config):
        state = load_optimizer_spec(config.optim.name).state_bytes_of(group)
        # ZeRO keeps a float32 master copy for float32 weights too.
        masters = 4 if width == 2 or config.zero.stage else 0
        number = group.num_parameters
        memory = (2 * width + masters + state) * number
        rows.append(ParamGroupSummary(group.name, number, group.lr, group.weight_decay, precision.name, memory))
    rows.append(_frozen_summary(model, config, precision.name, width))
    return rows


def _frozen_summary(model: Any, config: TrainConfig, precision: str, width: int) -> ParamGroupSummary:
    """Returns the row of the frozen parameters.

    Under QLoRA the linear layers of the body count as quantised, also in a model on the meta device that is not yet.
    """
    quantised = plain = 0
    head = model.get_output_embeddings()
    quantised_ids = {
        id(module.weight)
        for module in model.modules()
        if isinstance(module, LINEAR) and module is not head and config.tuning.method is TuningMethod.qlora
    }
    for parameter in model.parameters():
        if not parameter.requires_grad and id(parameter) in quantised_ids:
            quantised += logical_numel(parameter)
        elif not parameter.requires_grad:
            plain += parameter.numel()
    dtypes = [("nf4" if config.tuning.bits == 4 else "int8")] * bool(quantised) + [precision] * bool(plain)
    memory_bytes = round(quantised * QUANTISED_BYTES[config.tuning.bits] + plain * width)
    return ParamGroupSummary("frozen", quantised + plain, None, None, "+".join(dtypes), memory_bytes)


def logical_numel(parameter: Any) -> int:
    """Returns the number of elements; for a packed 4-bit weight that of the unpacked one."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """Returns the number of all parameters, and of the trainable ones."""
    counts = [(logical_numel(parameter), parameter.requires_grad) for parameter in model.parameters()]
    return sum(number for number, _ in counts), sum(number for number, trainable in counts if trainable)


def notes_on_experts(model: nn.Module, config: TrainConfig) -> list[str]:
    """What is not done with the experts of a model: a loss that balances their load, and adapters on them."""
    experts = sum(parameter.numel() for _, parameter in expert_parameters(model))
    if not experts:
        return []
    if not config.tuning.has_adapters:
        if config.objective.router_aux_loss:
            return []
        remedy = "; objective.router_aux_loss=0.001 adds one" * has_router_losses(model.config)
        return [f"note: no loss that balances the load of the experts is added, as by default in transformers{remedy}"]
    quantised = config.tuning.method is TuningMethod.qlora  # bitsandbytes quantises layers alone
    share = experts / count_parameters(model)[0]
    if config.tuning.experts:
        return [
            f"note: bitsandbytes quantises linear layers alone: the experts, which hold {share:.0%} of the parameters, "
            "stay in 16 bits"
        ] * quantised
    return [
        f"note: tuning={config.tuning.method.name} puts no adapters on the experts, which hold {share:.0%} of the "
        "parameters and stay as they are" + ", in 16 bits" * quantised + "; tuning.experts=true puts adapters on them"
    ]


def format_groups(rows: list[ParamGroupSummary]) -> str:
    """Formats the rows as a table of text."""
    lines = [f"{'group':<15}{'parameters':>16}{'lr':>10}{'decay':>8}  {'dtype':<10}{'memory':>10}"]
    for row in rows:
        if row.parameters:
            lr, decay = ("-" if value is None else f"{value:g}" for value in (row.lr, row.weight_decay))
            scale, unit = (2**30, "GiB") if row.memory_bytes >= 2**27 else (2**20, "MiB")
            memory = f"{row.memory_bytes / scale:.{2 if unit == 'GiB' else 1}f} {unit}"
            lines.append(f"{row.group:<15}{row.parameters:>16,}{lr:>10}{decay:>8}  {row.dtype:<10}{memory:>10}")
    return "\n".join(lines)
