"""Hydra: composes `conf/<verb>.yaml` and the command line into a typed config, and calls the verb with it."""

import dataclasses
import difflib
import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from fireflyds import option_reference
from fireflyds.config import VERBS
from fireflyds.errors import UserError

CONF = Path(__file__).parents[1] / "conf"

C = TypeVar("C")

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


def main(verb: Callable[..., Any], description: str, *, passes_on: bool = False) -> None:
    """Compose the config of a verb from `sys.argv` and call it. Leaves the process with an exit code.

    `about` is the verb's module docstring, shown by `-h`. With `passes_on` the verb also gets the arguments that are
    none of its own keys. A `UserError` becomes one message on stderr and its `exit_code`, an interrupt exit code 130.
    """
    name = Path(sys.argv[0]).stem
    # Progress bars of weight loading are noise in logs; transformers' reads this when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Its warning is about a kernel for 4-bit inference on CPUs, which training does not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    arguments = drop_local_rank(sys.argv[1:])
    try:
        if {"-h", "--help"} & set(arguments):
            print(option_reference.help_text(name, description, CONF), flush=True)
            return
        show, file = _take(arguments, "--cfg"), _take(arguments, "--config")
        if show not in (None, "job"):
            raise UserError("only the value job is known", key="--cfg", value=show, remedy="Give --cfg job")
        flags = [argument for argument in arguments if argument.startswith("-")]
        if flags:
            raise UserError("no such option", key=flags[0], remedy="Keys are written key=value; -h lists them")
        passed_on: list[str] = []
        if passes_on:
            arguments, passed_on = split(name, arguments)
        config = compose(name, arguments) if file is None else _frozen(name, file, arguments)
        if show:
            print(to_yaml(config), end="")
        else:
            verb(config, passed_on) if passes_on else verb(config)
    except _refusals() as error:
        # One message a node: an error may be of this machine alone.
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            # Launchers end all ranks as soon as one has left: rank 0 of the node prints its message first.
            time.sleep(2)
        sys.exit(error.exit_code if isinstance(error, UserError) else UserError.exit_code)
    except BrokenPipeError:  # `... -h | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print("interrupted: what is whole stays; give the same command again", file=sys.stderr)
        sys.exit(130)


def _refusals() -> tuple[type[Exception], ...]:
    """Returns the errors shown as one message: `UserError` and, if kernels are loaded, that of one that cannot run."""
    kernels = sys.modules.get("fireflyds_kernels.dispatch")
    return (UserError,) if kernels is None else (UserError, kernels.CannotRunError)


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


def compose(verb: str, overrides: list[str]) -> Any:
    """The typed config of a verb.

    Raises:
        UserError: an unknown key, a missing value, a wrong type, an unknown option or a rule broken.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from omegaconf import OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    ConfigStore.instance().store(name=f"{verb}_schema", node=VERBS[verb].config)
    plain = dict(override.split("=", 1) for override in overrides if _is_text(verb, override))
    hydra_overrides = [
        part for override in overrides if not _is_text(verb, override) for part in _rewrite(verb, override)
    ]
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
            composed = hydra_compose(config_name=verb, overrides=hydra_overrides)
        for key, value in plain.items():
            section, in_texts, name = key.partition("texts.")
            text = value.replace("${", "\\${")
            if in_texts:
                with open_dict(composed):
                    OmegaConf.select(composed, f"{section}texts")[name] = text
            else:
                OmegaConf.update(composed, key, text)
        missing = sorted(OmegaConf.missing_keys(composed))
        if missing:
            raise UserError(
                f"is not set; {verb} needs {', '.join(missing)}", key=missing[0], remedy=f"Give {missing[0]}=<value>"
            )
        return OmegaConf.to_object(composed)
    except UserError:
        raise
    except (HydraException, OmegaConfBaseException) as error:
        raise _user_error(verb, error) from error


def to_yaml(config: Any) -> str:
    """A typed config as YAML that composes to the same config again."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.structured(config))


def plain(yaml_text: str) -> dict[str, Any]:
    """A configuration as values without types, to compare and to show."""
    import yaml

    found: dict[str, Any] = yaml.safe_load(yaml_text)
    return found


def from_yaml(path: Path, schema: type[C]) -> C:
    """Read back what `to_yaml` wrote, checked against the schema."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(path))
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except OmegaConfBaseException as error:
        raise UserError(
            str(error).splitlines()[0],
            key=path,
            remedy="Another version wrote the file, or it was edited: restore it or write it again",
        ) from error


def option(group: str, name: str) -> Path:
    """The file of an option: its name in `conf/<group>`, or a path.

    Raises:
        UserError: there is none; the message lists those there are.
    """
    file = Path(name) if name.endswith(".yaml") else CONF / group / f"{name}.yaml"
    if not file.is_file():
        known = sorted(path.stem for path in (CONF / group).glob("*.yaml"))
        raise UserError(
            f"no such file, here or in conf/{group}", key=group, value=name, remedy=f"Known: {', '.join(known)}"
        )
    return file


def options_hash() -> str:
    """A hash of all option files: they decide what a command does."""
    digest = hashlib.sha256()
    for file in sorted(CONF.rglob("*.yaml")):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def split(verb: str, arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments whose keys the verb has itself, and those that it passes on to another verb."""
    own = {field.name for field in dataclasses.fields(VERBS[verb].config)}
    of_verb = [bool(own & {re.split(r"[.=@]", argument.lstrip("+~"))[0]}) for argument in arguments]
    return (
        [argument for argument, is_of_verb in zip(arguments, of_verb, strict=True) if is_of_verb],
        [argument for argument, is_of_verb in zip(arguments, of_verb, strict=True) if not is_of_verb],
    )


def _take(arguments: list[str], flag: str) -> str | None:
    """Take a flag and its value out of the arguments."""
    if flag not in arguments:
        return None
    at = arguments.index(flag)
    value = "".join(arguments[at + 1 : at + 2])
    del arguments[at : at + 2]
    return value


def _frozen(verb: str, file: str, arguments: list[str]) -> Any:
    """A configuration that was composed before, such as by `launch/submit.py`."""
    if arguments:
        raise UserError(
            f"--config {file} is the whole configuration", key=arguments[0], remedy="Leave the key out, or the file"
        )
    if not Path(file).is_file():
        raise UserError(
            "no such file",
            key="--config",
            value=file,
            remedy="Give a configuration that was written whole, as `config.yaml`",
        )
    return from_yaml(Path(file), VERBS[verb].config)


def _is_text(verb: str, override: str) -> bool:
    """`prompt=Hi!`: a key whose value is text is taken as typed. Hydra's grammar would read some of its characters,
    and would take `model=<dir>` for an option of `conf/model`."""
    key, equals, _ = override.partition("=")
    types = {field.name: field.type for field in dataclasses.fields(VERBS[verb].config)}
    # A domain is a name of the user's own, in whatever script.
    in_texts = any(key.startswith(f"{section}.") for section in OPEN_SECTIONS if section.endswith("texts"))
    return bool(equals) and ((in_texts and key.partition(".")[0] in types) or types.get(key) is str)


def _rewrite(verb: str, override: str) -> list[str]:
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
    if key not in VERBS[verb].path_options or (CONF / key / f"{value}.yaml").exists():
        return [f"{key}={quoted}"]
    if not (os.sep in value or os.path.exists(value) or set("*?.") & set(value)):
        known = sorted(p.stem for p in (CONF / key).glob("*.yaml"))
        raise UserError(
            f"neither a file or folder nor an option of conf/{key}",
            key=key,
            value=value,
            remedy=f"Known: {', '.join(known)}",
        )
    short = VERBS[verb].path_options[key]
    return [f"{key}={short.option}", short.override.format(quoted)]


def unknown_key(verb: str, key: str, section: str = "") -> UserError:
    """Returns the error for a key that a verb does not have; `section` is what stands before the key, as typed."""
    known = [row[0] for row in option_reference.options(VERBS[verb].config)]
    near = difflib.get_close_matches(key, known, n=3, cutoff=0.5)
    hint = f"Did you mean {' or '.join(near)}? " if near else ""
    remedy = f"{hint}`python launch/{verb}.py -h` lists all keys"
    return UserError(f"no such key for {verb}", key=section + key, remedy=remedy)


def _user_error(verb: str, error: Exception) -> UserError:
    """Hydra's error with what it leaves out: the nearest known keys, and where to look."""
    text = str(error.__cause__ or error).split("\nConfig search path")[0]
    if "You must specify" in text:
        text += f" (or a path: {verb} takes <group>=<path> too)" if VERBS[verb].path_options else ""
    found = re.search(r"[Kk]ey '([^']+)'", text)
    full = re.search(r"full_key: (\S+)", text)
    if found and ("not in" in text or "not exist" in text):
        return unknown_key(verb, full.group(1) if full else found.group(1))
    first = " ".join(line.strip() for line in text.split("full_key:")[0].split("\n") if line.strip())
    remedy = f"`python launch/{verb}.py -h` lists all keys"
    return UserError(first.rstrip("."), key=full.group(1) if full else "", remedy=remedy)
