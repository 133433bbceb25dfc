"""Hydra: composes `conf/<verb>.yaml` and the command line into a typed config, and calls the verb with it."""

import dataclasses
import hashlib
import logging
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from fireflyds import exit_handling, hub, option_reference, overrides
from fireflyds.config import VERBS
from fireflyds.errors import UserError
from fireflyds.overrides import CONF

C = TypeVar("C")


def main(verb: Callable[..., Any], description: str, *, passes_on: bool = False) -> None:
    """Compose the config of a verb from `sys.argv` and call it. Leaves the process with an exit code.

    `description` is the verb's module docstring, shown by `-h`. With `passes_on` the verb also gets the arguments that
    are none of its own keys. A `UserError` becomes one message on stderr and its `exit_code`, an interrupt code 130.
    """
    name = Path(sys.argv[0]).stem
    # Progress bars of weight loading are noise in logs; transformers' reads this when it is imported.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Packed micro-batches all have other sizes: fixed segments would break into pieces that fit none. Torch reads it
    # when it is imported.
    if not {"PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"} & os.environ.keys():
        os.environ["PYTORCH_CUDA_ALLOC_CONF"] = "expandable_segments:True"
    # Its warning is about a kernel for 4-bit inference on CPUs, which training does not use.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    arguments = overrides.drop_local_rank(sys.argv[1:])
    try:
        if {"-h", "--help"} & set(arguments):
            print(option_reference.help_text(name, description, CONF), flush=True)
            return
        show, file = _take(arguments, "--cfg"), _take(arguments, "--config")
        if show not in (None, "job"):
            raise UserError("only the value job is known", key="--cfg", value=show, remedy="Give --cfg job")
        config_dir = _take(arguments, "--config-dir")
        overrides.refuse_flags(name, arguments)
        passed_on: list[str] = []
        if passes_on:
            arguments, passed_on = split(name, arguments)
        config = compose(name, arguments, config_dir) if file is None else _frozen(name, file, arguments)
        if show:
            print(to_yaml(config), end="")
        else:
            hub.localize(config, VERBS[name].models, weights=VERBS[name].needs_weights)
            verb(config, passed_on) if passes_on else verb(config)
    except _refusals() as error:
        # One message a node: an error may be of this machine alone.
        if os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", "0")) == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        else:
            # Launchers end all ranks as soon as one has left: rank 0 of the node prints its message first.
            time.sleep(2)
        code = error.exit_code if isinstance(error, UserError) else UserError.exit_code
        if exit_handling.has_process_group():
            exit_handling.end_process(code)
        sys.exit(code)
    except BrokenPipeError:  # `... -h | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        print(exit_handling.MESSAGE, file=sys.stderr)
        exit_handling.end_process(exit_handling.EXIT_INTERRUPTED)


def _refusals() -> tuple[type[Exception], ...]:
    """Returns the errors shown as one message: `UserError` and, if kernels are loaded, that of one that cannot run."""
    kernels = sys.modules.get("fireflyds_kernels.dispatch")
    return (UserError,) if kernels is None else (UserError, kernels.CannotRunError)


def compose(verb: str, words: Sequence[str], config_dir: str | None = None) -> Any:
    """The typed config of a verb. `config_dir`: a folder with options of one's own, in the shape of `conf/`.

    Raises:
        UserError: an unknown key, a missing value, a wrong type, an unknown option or a rule broken.
    """
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    folders = [CONF]
    if config_dir is not None:
        if not Path(config_dir).is_dir():
            raise UserError(
                "no such folder", key="--config-dir", value=config_dir, remedy="Give a folder in the shape of conf/"
            )
        folders.append(Path(config_dir).absolute())
    given = overrides.sort(verb, words, folders)
    try:
        composed = _composed(verb, given, folders[1:])
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


def _composed(verb: str, given: overrides.Overrides, own_folders: Sequence[Path]) -> Any:
    """Composes the options and sets the values that Hydra's grammar cannot express."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf, open_dict

    ConfigStore.instance().store(name=f"{verb}_schema", node=VERBS[verb].config)
    with tempfile.TemporaryDirectory() as files, initialize_config_dir(version_base="1.3", config_dir=str(CONF)):
        for name, file in given.files.items():
            link = Path(files) / f"{name}.yaml"
            link.parent.mkdir(exist_ok=True)
            link.symlink_to(file)
        paths = [*own_folders, *([Path(files)] if given.files else [])]
        search = ",".join(f"'file://{path}'" for path in paths)
        composed = hydra_compose(
            config_name=verb, overrides=[*([f"hydra.searchpath=[{search}]"] if paths else []), *given.for_hydra]
        )
    for key, value in given.values:
        if isinstance(value, str):
            value = value.replace("${", "\\${")
        section = next((name for name in overrides.OPEN_SECTIONS if key.startswith(f"{name}.")), None)
        if section is not None:  # its keys may have dots
            with open_dict(composed):
                OmegaConf.select(composed, section)[key.removeprefix(f"{section}.")] = value
        else:
            OmegaConf.update(composed, key, value, force_add=key in overrides.OPEN_SECTIONS)
    return composed


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


def _user_error(verb: str, error: Exception) -> UserError:
    """Hydra's error with what it leaves out: the nearest known keys, and where to look."""
    text = str(error.__cause__ or error).split("\nConfig search path")[0]
    if "You must specify" in text:
        text += f" (or a path: {verb} takes <group>=<path> too)" if VERBS[verb].path_options else ""
    found = re.search(r"[Kk]ey '([^']+)'", text)
    full = re.search(r"full_key: (\S+)", text)
    if found and ("not in" in text or "not exist" in text):
        return overrides.unknown_key(verb, full.group(1) if full else found.group(1))
    first = " ".join(line.strip() for line in text.split("full_key:")[0].split("\n") if line.strip())
    remedy = f"`python launch/{verb}.py -h` lists all keys"
    return UserError(first.rstrip("."), key=full.group(1) if full else "", remedy=remedy)
