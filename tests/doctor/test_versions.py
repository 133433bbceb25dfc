"""Libraries outside the ranges that fireflyds requires, or in conflict with each other, are named with a remedy."""

import pytest

from fireflyds.doctor import versions
from fireflyds.doctor.check import Severity

REQUIRED = [
    "torch>=2.10",
    "deepspeed>=0.19.6,<0.20",
    "transformers>=5.5,<6",
    'wandb>=0.19; extra == "tracking"',
    'nowhere>=1; platform_system == "Plan 9"',
]
INSTALLED = {"torch": "2.13.0+cpu", "deepspeed": "0.19.8", "transformers": "5.17.0"}


@pytest.mark.parametrize(
    ("changes", "severity", "message", "remedy"),
    [
        ({}, Severity.ok, "torch 2.13.0+cpu", ""),
        ({"torch": "2.15.0rc1"}, Severity.ok, "torch 2.15.0rc1", ""),
        ({"torch": "2.9.1+cu128"}, Severity.error, "torch 2.9.1+cu128 is outside >=2.10", "pip install 'torch>=2.10'"),
        ({"deepspeed": "0.20.0"}, Severity.error, "deepspeed 0.20.0 is outside", "'deepspeed<0.20,>=0.19.6'"),
        ({"deepspeed": "0.18.3"}, Severity.error, "deepspeed 0.18.3 is outside", "'deepspeed<0.20,>=0.19.6'"),
        ({"transformers": None}, Severity.error, "transformers is missing", "'transformers<6,>=5.5'"),
        ({"wandb": "0.31.0"}, Severity.ok, "torch", ""),
        ({"wandb": "0.15.0"}, Severity.error, "wandb 0.15.0 is outside >=0.19", "'wandb>=0.19'"),
    ],
)
def test_versions_outside_their_ranges_are_errors(changes, severity, message, remedy) -> None:
    check = versions.check_ranges(REQUIRED, (INSTALLED | changes).get)
    assert check.severity is severity
    assert message in check.message
    assert remedy in check.remedy


def test_the_ranges_are_those_of_the_installed_package() -> None:
    required = versions.own_requirements()
    assert any(text.startswith("deepspeed") and "0.20" in text for text in required)
    check = versions.check_ranges(required, versions.installed_version)
    assert check.severity is Severity.ok, check
    missing_check = versions.check_ranges([], versions.installed_version)
    assert missing_check.severity is Severity.warning
    assert "pip install -e ." in missing_check.remedy


def test_conflicting_requirements_of_libraries_are_a_warning() -> None:
    requirements = {"wandb": ["protobuf<8,!=5.28.0", "click"], "swanlab": ["protobuf<7", 'gone>=1; extra == "media"']}
    installed = {"wandb": "0.31", "swanlab": "0.10", "protobuf": "6.33.0", "click": "8.2"}
    assert versions.check_demands(requirements, installed.get).severity is Severity.ok
    conflict = versions.check_demands(requirements, (installed | {"protobuf": "7.36.2"}).get)
    assert conflict.severity is Severity.warning
    assert conflict.message == "swanlab 0.10 requires protobuf<7, installed: 7.36.2"
    assert "'protobuf<7'" in conflict.remedy
    assert "click, installed: none" in versions.check_demands(requirements, (installed | {"click": None}).get).message


def test_the_closure_of_requirements_lists_every_library_once() -> None:
    requirements = {"a": ["B_x>=1", 'c; extra == "more"'], "B_x": ["a", "d"], "d": [], "c": []}
    assert versions.closure(["a"], requirements.get) == {"a": ["B_x>=1"], "b-x": ["a", "d"], "d": []}


def test_hosts_with_different_versions_are_an_error_and_named() -> None:
    versions_by_host = {"n1": {"torch": "2.13", "peft": "0.21"}, "n2": {"torch": "2.13", "peft": "0.21"}}
    assert versions.check_same(versions_by_host).severity is Severity.ok
    check = versions.check_same(versions_by_host | {"n3": {"torch": "2.14"}})
    assert check.severity is Severity.error
    assert check.message == "peft 0.21 on n1 and 1 more, none on n3; torch 2.13 on n1 and 1 more, 2.14 on n3"


def test_a_flash_attn_built_for_another_torch_is_an_error() -> None:
    assert versions.import_error("json") is None
    error = versions.import_error("no_such_library")
    assert error == "ModuleNotFoundError: No module named 'no_such_library'"
    assert versions.check_flash_attention("ImportError: undefined symbol: _ZN3c10").severity is Severity.error
    assert versions.check_flash_attention(None).severity is Severity.ok
