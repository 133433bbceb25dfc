"""The words of a command line, before Hydra reads them: paths for options, values and keys in any script, other names.

Hydra's grammar knows letters of ASCII only and takes a comma for a sweep. What it would misread is set on the composed
configuration instead (`Overrides.values`), with the types that the schema demands.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fireflyds import option_reference
from fireflyds.config import VERBS
from fireflyds.errors import UserError

CONF = Path(__file__).parents[1] / "conf"

# Sections whose keys are the user's own; Hydra wants such keys announced with ++.
OPEN_SECTIONS = (
    "texts",
    "bits_per_byte.texts",
    "cluster.environment",
    "data.weights",
    "data.max_epochs",
    "model.architecture",
    "model.rope_scaling",
    "zero.extra",
)
# Names of Hugging Face's trainer, PEFT and LLaMA-Factory, with ours.
OTHER_NAMES = {
    "model_name_or_path": "model=<folder or name>",
    "tokenizer_name_or_path": "tokenizer=<folder> (prepare) or model.tokenizer=<folder> (train)",
    "dataset": "data=<file, folder or option>",
    "dataset_dir": "data=<folder>",
    "output_dir": "run=<name>, which is written to runs/<name>",
    "learning_rate": "optim.lr",
    "num_train_epochs": "optim.epochs",
    "max_steps": "optim.steps",
    "lr_scheduler_type": "optim.schedule",
    "warmup_steps": "optim.warmup_steps",
    "warmup_ratio": "optim.warmup_ratio",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm",
    "adam_beta1": "optim.betas=[0.9,0.95]",
    "adam_beta2": "optim.betas=[0.9,0.95]",
    "adam_epsilon": "optim.eps",
    "neftune_noise_alpha": "optim.neftune_noise_alpha",
    "per_device_train_batch_size": "micro_batch_size",
    "gradient_accumulation_steps": "global_batch_size, which is micro_batch_size x ranks x accumulation steps",
    "cutoff_len": "seq_len",
    "max_length": "seq_len",
    "max_seq_length": "seq_len",
    "model_max_length": "seq_len",
    "block_size": "seq_len",
    "packing": "nothing: rows are always packed",
    "finetuning_type": "tuning=full, lora or qlora",
    "quantization_bit": "tuning=qlora",
    "load_in_4bit": "tuning=qlora",
    "lora_rank": "tuning.r",
    "lora_r": "tuning.r",
    "lora_alpha": "tuning.alpha",
    "lora_dropout": "tuning.dropout",
    "lora_target": "tuning.target_modules",
    "lora_target_modules": "tuning.target_modules",
    "target_modules": "tuning.target_modules",
    "target_parameters": "tuning.experts=true",
    "router_aux_loss_coef": "objective.router_aux_loss",
    "moe_aux_loss_coef": "objective.router_aux_loss",
    "use_rslora": "tuning.use_rslora",
    "use_dora": "tuning.use_dora",
    "bf16": "hardware.precision=bf16",
    "fp16": "hardware.precision=fp16",
    "gradient_checkpointing": "hardware.gradient_checkpointing=true",
    "flash_attn": "hardware.attention",
    "attn_implementation": "hardware.attention",
    "deepspeed": "zero=stage2, or zero.json=<file>",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "logging_steps": "log_every",
    "eval_steps": "validation.every",
    "report_to": "tracking=wandb or none",
    "run_name": "run",
    "resume_from_checkpoint": "the same run=<name>: a run resumes by itself",
    "train_on_prompt": "loss_on=all (prepare)",
    "roles_to_train": "learn_roles=[assistant,user] (prepare)",
    "preprocessing_num_workers": "workers (prepare)",
    "export_dir": "out (export)",
    "export_hub_model_id": "hub (export)",
    "hub_model_id": "hub (export)",
    "stage": "objective=causal_lm; dialogues and text differ by their data alone",
}


@dataclass(slots=True)
class Overrides:
    """A command line, sorted: what Hydra composes, values set afterwards, and files that stand for options."""

    for_hydra: list[str] = field(default_factory=list)
    values: list[tuple[str, Any]] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    """Option files given by path, by `<group>/<name>`."""


def sort(verb: str, words: Sequence[str], conf: Sequence[Path] = (CONF,)) -> Overrides:
    """Sorts the words of a command line. `conf`: the folders that hold options.

    Raises:
        UserError: a word is not key=value, or its value cannot be read.
    """
    sorted_words = Overrides()
    for word in words:
        key, equals, value = word.partition("=")
        if not equals and not word.startswith("~"):
            raise _not_a_key(verb, word)
        if is_text(verb, word):
            sorted_words.values.append((key, value))
        elif (file := _option_file(key, value)) is not None:
            name = f"file_{re.sub(r'[^A-Za-z0-9_]', '_', file.stem)}"
            sorted_words.files[f"{key.lstrip('+')}/{name}"] = file
            sorted_words.for_hydra.append(f"{key}={name}")
        elif (direct := _direct(verb, key, value)) is not None:
            sorted_words.values.append(direct)
        else:
            sorted_words.for_hydra += _rewrite(verb, word, conf)
    return sorted_words


def drop_local_rank(arguments: list[str]) -> list[str]:
    """Launchers add `--local_rank N` in several spellings; the environment says the same, so it is dropped."""
    kept_arguments: list[str] = []
    skip = False
    for argument in arguments:
        if skip:
            skip = False
        elif re.fullmatch(r"--local[-_]rank", argument):
            skip = True
        elif not re.fullmatch(r"--local[-_]rank=.*", argument):
            kept_arguments.append(argument)
    return kept_arguments


def refuse_flags(verb: str, arguments: Sequence[str]) -> None:
    """Raises `UserError` for arguments with dashes, with what to type instead."""
    for argument in arguments:
        if argument in ("-m", "--multirun"):
            remedy = "Leave it out" if verb == "sweep" else "Use python launch/sweep.py; its -h has examples"
            raise UserError("sweeps are a verb of their own", key=argument, remedy=remedy)
        if not argument.startswith("-"):
            continue
        name = argument.lstrip("-").partition("=")[0].replace("-", "_")
        remedy = "Keys are written key=value; -h lists them"
        if name in OTHER_NAMES:
            remedy = f"Here it is {OTHER_NAMES[name]}, written key=value"
        elif name in {row[0] for row in option_reference.options(VERBS[verb].config)}:
            remedy = f"Write {name}=<value>"
        raise UserError("no such option", key=argument, remedy=remedy)


def unknown_key(verb: str, key: str, section: str = "") -> UserError:
    """Returns the error for a key that a verb does not have; `section` is what stands before the key, as typed."""
    known = [row[0] for row in option_reference.options(VERBS[verb].config)]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    if key in OTHER_NAMES:
        hint = f"Here it is {OTHER_NAMES[key]}. "
    return UserError(
        f"no such key for {verb}", key=section + key, remedy=f"{hint}`python launch/{verb}.py -h` lists all keys"
    )


def _not_a_key(verb: str, word: str) -> UserError:
    """The error for a word without `=`: the rest of a value with spaces, a path, or a key without a value."""
    known = {row[0] for row in option_reference.options(VERBS[verb].config)}
    remedy = f'Quote a value that contains spaces, as in "key={word} …"'
    if Path(word).exists():
        remedy = f"Say what it is, as in data={word} or model={word}"
    elif word in known or word in option_reference.choices(CONF, VERBS[verb].config):
        remedy = f"Give {word}=<value>"
    return UserError("is not key=value", key=word, remedy=remedy)


def _option_file(key: str, value: str) -> Path | None:
    """The file of `data=mix.yaml`: an option by its path."""
    path = Path(value)
    is_group = (CONF / key.lstrip("+")).is_dir()
    return path.absolute() if is_group and path.suffix in (".yaml", ".yml") and path.is_file() else None


def is_text(verb: str, override: str) -> bool:
    """`prompt=Hi!`: a key whose value is text is taken as typed. Hydra's grammar would read some of its characters,
    and would take `model=<dir>` for an option of `conf/model`."""
    key, equals, _ = override.partition("=")
    types = {field.name: field.type for field in dataclasses.fields(VERBS[verb].config)}
    # A domain is a name of the user's own, in whatever script.
    in_texts = any(key.startswith(f"{section}.") for section in OPEN_SECTIONS if section.endswith("texts"))
    return bool(equals) and ((in_texts and key.partition(".")[0] in types) or types.get(key) is str)


def _direct(verb: str, key: str, value: str) -> tuple[str, Any] | None:
    """The key and value of an override that Hydra's grammar would misread; None where it would not.

    Those are keys and collections with characters outside ASCII, and lists without brackets.
    """
    import yaml

    plain = key.lstrip("+")
    kind = {row.key: row.kind for row in option_reference.rows(VERBS[verb].config)}.get(plain, "")
    is_collection = value[:1] in tuple("[{")
    is_list = kind.startswith("list of") and not is_collection and value not in ("", "null")
    odd = not (plain + value).isascii() and not plain.startswith("sweep.space.")
    if not (is_list or (odd and (is_collection or not plain.isascii()))):
        return None
    try:
        parsed = [part.strip() for part in value.split(",")] if is_list else yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(
            f"cannot be read ({str(error).splitlines()[0]})",
            key=plain,
            value=value,
            remedy="Write lists as [a, b] and maps as {a: 1}, and quote items with commas or colons",
        ) from error
    return plain, parsed


def _rewrite(verb: str, override: str, conf: Sequence[Path]) -> list[str]:
    """Replaces `model=<path>` by `model=at_path` and `model.path=<path>`, and quotes values that Hydra misreads."""
    key, equals, value = override.partition("=")
    if not equals or key.startswith(("+", "~")):
        return [override]
    if key.startswith("sweep.space."):  # the range of a key, whose name has dots of its own
        if value[:1] not in ("{", "["):
            raise UserError(
                "is no range", key=override, remedy=f"Give {key}={{low: 1e-5, high: 1e-3}} or {key}=[1e-5, 1e-4]"
            )
        one = f"{{choices: {value}}}" if value.startswith("[") else value
        return [f"++sweep.space={{{key.removeprefix('sweep.space.')}: {one}}}"]
    if key == "zero" and value in tuple("0123"):  # Hydra takes no number for an option
        return [f"zero=stage{value}"]
    is_open = key.partition(".")[0] in {field.name for field in dataclasses.fields(VERBS[verb].config)} and any(
        key == section or key.startswith(f"{section}.") for section in OPEN_SECTIONS
    )
    if value[:1] in tuple("[{'\""):
        return [f"++{override}" if is_open else override]
    special = re.fullmatch(r"[\w./+-]*", value, re.ASCII) is None
    quoted = "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("${", "\\${") + "'" if special else value
    if is_open:
        return [f"++{key}={quoted}"]
    if key not in VERBS[verb].path_options or any((folder / key / f"{value}.yaml").exists() for folder in conf):
        return [f"{key}={quoted}"]
    if not (os.sep in value or os.path.exists(value) or set("*?.:") & set(value)):
        known = sorted({file.stem for folder in conf for file in (folder / key).glob("*.yaml")})
        raise UserError(
            f"neither a file or folder nor an option of conf/{key}",
            key=key,
            value=value,
            remedy=f"Known: {', '.join(known)}",
        )
    short = VERBS[verb].path_options[key]
    return [f"{key}={short.option}", short.override.format(quoted)]
