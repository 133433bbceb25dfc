"""Checks that libraries are installed, in the version ranges of fireflyds, and compatible with each other."""

import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fireflyds.doctor.check import Check, failed, passed, warning
from fireflyds.runs.provenance import installed_version

# Packages whose versions are part of the report.
_REPORTED_PACKAGES = ("fireflyds", "torch", "transformers", "deepspeed", "peft", "bitsandbytes", "triton", "numpy")


def own_requirements() -> list[str]:
    """Requirements of the installed fireflyds; empty when it runs from its source without being installed."""
    try:
        return metadata.requires("fireflyds") or []
    except metadata.PackageNotFoundError:
        return []


def installed(requirements: Iterable[str]) -> dict[str, str]:
    """Installed versions by name of the requirements of fireflyds, including extras."""
    names = {Requirement(text).name for text in requirements} | set(_REPORTED_PACKAGES)
    return {name: version for name in sorted(names) if (version := installed_version(name)) is not None}


def check_all() -> list[Check]:
    """Checks of the installed package versions: required ranges, demands of dependencies, and FlashAttention."""
    requirements = own_requirements()
    checks = [check_ranges(requirements, installed_version)]
    if requirements:
        checks.append(check_demands(closure(requirements, _requires), installed_version))
    if find_spec("flash_attn") is not None:
        checks.append(check_flash_attention(import_error("flash_attn")))
    return checks


def check_ranges(requirements: list[str], version: Callable[[str], str | None]) -> Check:
    """Checks the ranges of `pyproject.toml`, from the metadata of the installed package; extras only if installed."""
    summary = ", ".join(
        [
            f"python {platform.python_version()}",
            *(f"{name} {version(name)}" for name in _REPORTED_PACKAGES if version(name)),
        ]
    )
    if not requirements:
        return warning(
            "versions",
            f"{summary}; fireflyds is not installed, so its version ranges are not known",
            "pip install -e . in the repository of fireflyds",
        )
    faults, specifiers = [], []
    for requirement in map(Requirement, requirements):
        installed_version = version(requirement.name)
        optional = requirement.marker is not None and "extra" in str(requirement.marker)
        if installed_version is None and not optional and (requirement.marker is None or requirement.marker.evaluate()):
            faults.append(f"{requirement.name} is missing")
        elif installed_version is not None and not requirement.specifier.contains(installed_version, prereleases=True):
            faults.append(f"{requirement.name} {installed_version} is outside {requirement.specifier}")
        else:
            continue
        specifiers.append(f"'{requirement.name}{requirement.specifier}'")
    if faults:
        return failed(
            "versions", f"{'; '.join(dict.fromkeys(faults))} ({summary})", f"pip install {_join_unique(specifiers)}"
        )
    return passed("versions", summary)


def check_demands(asked: Mapping[str, list[str]], version: Callable[[str], str | None]) -> Check:
    """Checks the libraries' requirements on each other (wandb on protobuf). `asked`: requirements by library."""
    faults, specifiers = [], []
    for library, requirements in asked.items():
        for requirement in map(Requirement, requirements):
            if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
                continue
            installed_version = version(requirement.name)
            if installed_version is None or not requirement.specifier.contains(installed_version, prereleases=True):
                faults.append(
                    f"{library} {version(library)} requires {requirement.name}{requirement.specifier}, installed: "
                    f"{installed_version or 'none'}"
                )
                specifiers.append(f"'{requirement.name}{requirement.specifier}'")
    if faults:
        return warning(
            "dependencies",
            "; ".join(faults),
            f"pip install {_join_unique(specifiers)}, or another {faults[0].split()[0]}",
        )
    return passed("dependencies", f"{len(asked)} libraries are compatible with each other")


def closure(requirements: Iterable[str], requires: Callable[[str], list[str] | None]) -> dict[str, list[str]]:
    """Installed libraries that `requirements` need directly or indirectly, each with its own requirements."""
    collected: dict[str, list[str]] = {}
    queue = [Requirement(text).name for text in requirements]
    while queue:
        name = queue.pop()
        dependencies = None if canonicalize_name(name) in collected else requires(name)
        if dependencies is None:
            continue
        applicable = [text for text in dependencies if _applies(text)]
        collected[canonicalize_name(name)] = applicable
        queue += [Requirement(text).name for text in applicable]
    return collected


def check_same(versions: Mapping[str, Mapping[str, str]]) -> Check:
    """Checks that all hosts have the same versions. `versions`: by host, then by library."""
    names = sorted({name for host_versions in versions.values() for name in host_versions})
    differences = []
    for name in names:
        by_version: dict[str, list[str]] = {}
        for host, host_versions in versions.items():
            by_version.setdefault(host_versions.get(name, "none"), []).append(host)
        if len(by_version) > 1:
            descriptions = (
                f"{version} on {hosts[0]}{f' and {len(hosts) - 1} more' * (len(hosts) > 1)}"
                for version, hosts in by_version.items()
            )
            differences.append(f"{name} {', '.join(descriptions)}")
    if differences:
        return failed(
            "same versions", "; ".join(differences), "install the same versions on all hosts, or use one shared venv"
        )
    return passed("same versions", f"{len(versions)} hosts have the same {len(names)} libraries")


def check_flash_attention(error: str | None) -> Check:
    """Checks that flash_attn, built for one torch and CUDA, can be imported. `error`: import error, None if none."""
    if error is None:
        return passed("flash_attn", f"flash_attn {installed_version('flash_attn')} loads")
    return failed(
        "flash_attn",
        f"flash_attn is installed and does not load: {error}",
        "install the wheel of flash_attn for this torch and CUDA, or pip uninstall flash_attn: torch brings its own",
    )


def import_error(package: str) -> str | None:
    """Imports a package in a separate process, which an incompatible build may crash. Returns the error or None."""
    process = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, text=True)
    return (
        None
        if process.returncode == 0
        else (process.stderr.strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    )


def _requires(name: str) -> list[str] | None:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return None


def _applies(text: str) -> bool:
    marker = Requirement(text).marker
    return marker is None or marker.evaluate({"extra": ""})


def _join_unique(words: list[str]) -> str:
    return " ".join(dict.fromkeys(words))
