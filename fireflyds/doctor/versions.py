"""Are the libraries there, in the ranges that fireflyds asks for, and content with each other?"""

import platform
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from importlib import metadata
from importlib.util import find_spec

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from fireflyds.doctor.check import Check, failed, passed, warning

# What a person names when something goes wrong; the JSON has all.
_TOLD = ("fireflyds", "torch", "transformers", "deepspeed", "peft", "bitsandbytes", "triton", "numpy")


def version_of(name: str) -> str | None:
    """The installed version; None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def own_requirements() -> list[str]:
    """What fireflyds, as installed, asks for; empty when it runs from its source without being installed."""
    try:
        return metadata.requires("fireflyds") or []
    except metadata.PackageNotFoundError:
        return []


def installed(requirements: Iterable[str]) -> dict[str, str]:
    """Name to version of what fireflyds asks for, its extras included, as far as it is there."""
    names = {Requirement(text).name for text in requirements} | set(_TOLD)
    return {name: version for name in sorted(names) if (version := version_of(name)) is not None}


def check_all() -> list[Check]:
    requirements = own_requirements()
    found = [check_ranges(requirements, version_of)]
    if requirements:
        found.append(check_demands(closure(requirements, _requires), version_of))
    if find_spec("flash_attn") is not None:
        found.append(check_flash_attention(_import_error("flash_attn")))
    return found


def check_ranges(requirements: list[str], version: Callable[[str], str | None]) -> Check:
    """The ranges of `pyproject.toml`, as the installed package carries them. Extras only where they are installed."""
    about = ", ".join(
        [f"python {platform.python_version()}", *(f"{name} {version(name)}" for name in _TOLD if version(name))]
    )
    if not requirements:
        return warning(
            "versions",
            f"{about}; fireflyds is not installed, so the ranges it asks for are not known",
            "pip install -e . in the folder of fireflyds",
        )
    faults, wanted = [], []
    for need in map(Requirement, requirements):
        have = version(need.name)
        optional = need.marker is not None and "extra" in str(need.marker)
        if have is None and not optional and (need.marker is None or need.marker.evaluate()):
            faults.append(f"{need.name} is missing")
        elif have is not None and not need.specifier.contains(have, prereleases=True):
            faults.append(f"{need.name} {have} is outside {need.specifier}")
        else:
            continue
        wanted.append(f"'{need.name}{need.specifier}'")
    if faults:
        return failed("versions", f"{'; '.join(dict.fromkeys(faults))} ({about})", f"pip install {_once(wanted)}")
    return passed("versions", about)


def check_demands(asked: Mapping[str, list[str]], version: Callable[[str], str | None]) -> Check:
    """What the libraries ask of each other (wandb of protobuf, transformers of tokenizers): `asked` is by the asker."""
    faults, wanted = [], []
    for asker, requirements in asked.items():
        for need in map(Requirement, requirements):
            if need.marker is not None and not need.marker.evaluate({"extra": ""}):
                continue
            have = version(need.name)
            if have is None or not need.specifier.contains(have, prereleases=True):
                faults.append(
                    f"{asker} {version(asker)} asks for {need.name}{need.specifier}, there is {have or 'none'}"
                )
                wanted.append(f"'{need.name}{need.specifier}'")
    if faults:
        return warning(
            "dependencies", "; ".join(faults), f"pip install {_once(wanted)}, or another {faults[0].split()[0]}"
        )
    return passed("dependencies", f"{len(asked)} libraries agree with each other")


def closure(requirements: Iterable[str], requires: Callable[[str], list[str] | None]) -> dict[str, list[str]]:
    """Every installed library that is needed, also by those needed, with what it asks for itself."""
    found: dict[str, list[str]] = {}
    waiting = [Requirement(text).name for text in requirements]
    while waiting:
        name = waiting.pop()
        asked = None if canonicalize_name(name) in found else requires(name)
        if asked is None:
            continue
        needed = [text for text in asked if _applies(text)]
        found[canonicalize_name(name)] = needed
        waiting += [Requirement(text).name for text in needed]
    return found


def check_same(versions: Mapping[str, Mapping[str, str]]) -> Check:
    """By host: different versions on different hosts are different programs."""
    names = sorted({name for of_host in versions.values() for name in of_host})
    apart = []
    for name in names:
        by_version: dict[str, list[str]] = {}
        for host, of_host in versions.items():
            by_version.setdefault(of_host.get(name, "none"), []).append(host)
        if len(by_version) > 1:
            told = (f"{version} on {hosts[0]}{f' and {len(hosts) - 1} more' * (len(hosts) > 1)}" for version, hosts in by_version.items())  # fmt: skip
            apart.append(f"{name} {', '.join(told)}")
    if apart:
        return failed(
            "same versions", "; ".join(apart), "install the same versions on all hosts, or use one shared venv"
        )
    return passed("same versions", f"{len(versions)} hosts have the same {len(names)} libraries")


def check_flash_attention(error: str | None) -> Check:
    """The package is built for one torch and one CUDA; `error` is what importing it said."""
    if error is None:
        return passed("flash_attn", f"flash_attn {version_of('flash_attn')} loads")
    return failed(
        "flash_attn",
        f"flash_attn is installed and does not load: {error}",
        "install the wheel of flash_attn for this torch and CUDA, or pip uninstall flash_attn: torch brings its own",
    )


def _import_error(package: str) -> str | None:
    """In a process of its own, which a library of another build may bring down."""
    done = subprocess.run([sys.executable, "-c", f"import {package}"], capture_output=True, text=True)
    return None if done.returncode == 0 else (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]


def _requires(name: str) -> list[str] | None:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        return None


def _applies(text: str) -> bool:
    marker = Requirement(text).marker
    return marker is None or marker.evaluate({"extra": ""})


def _once(words: list[str]) -> str:
    return " ".join(dict.fromkeys(words))
