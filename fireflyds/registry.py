"""Registries: every module of a package is one entry, and the module's name is the entry's name."""

import functools
import importlib
from pathlib import Path
from types import ModuleType

from fireflyds.errors import UserError

_ROOT = Path(__file__).parents[1]


@functools.cache  # entries are looked up for every dialogue
def names(package: str) -> tuple[str, ...]:
    """The entries of a package such as `fireflyds.data.templates`, in alphabetical order; nothing is imported."""
    return tuple(sorted(file.stem for file in _ROOT.joinpath(*package.split(".")).glob("[!_]*.py")))


def require(package: str, name: str, key: str, also: tuple[str, ...] = ()) -> None:
    """Raises `UserError`, which lists the entries of `package` and the values `also`, where `name`, the value of `key`,
    is none of them."""
    known = (*also, *names(package))
    if name not in known:
        raise UserError("no such entry", key=key, value=name, remedy=f"Known: {', '.join(known)}")


def find(package: str, name: str, key: str) -> ModuleType:
    """Returns the module of the entry `name`, the value of `key`.

    Raises:
        UserError: there is no such entry; the message lists the existing ones.
    """
    require(package, name, key)
    return load(package, name)


def load(package: str, name: str) -> ModuleType:
    """Returns the module of an entry that is known to exist."""
    return importlib.import_module(f"{package}.{name}")
