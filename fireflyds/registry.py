"""Registries: every module of a package is one entry, and the module's name is the entry's name."""

import functools
import importlib
import pkgutil
from types import ModuleType

from fireflyds.errors import UserError


@functools.cache  # entries are looked up for every dialogue, and listing a folder takes half a millisecond
def names(package: str) -> tuple[str, ...]:
    """The entries of a package such as `fireflyds.data.templates`, in alphabetical order."""
    folder = importlib.import_module(package).__path__
    return tuple(sorted(module.name for module in pkgutil.iter_modules(folder) if not module.name.startswith("_")))


def find(package: str, name: str) -> ModuleType:
    """Returns the module of the entry `name`.

    Raises:
        UserError: there is no such entry; the message lists the existing ones.
    """
    entries = names(package)
    if name not in entries:
        kind = package.rsplit(".", 1)[-1]
        raise UserError(f"no entry {name!r}", key=kind, remedy=f"Known: {', '.join(entries)}")
    return importlib.import_module(f"{package}.{name}")
