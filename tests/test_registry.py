import pytest

from fireflyds import registry
from fireflyds.errors import UserError


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(UserError, match="template=fireflies: no such entry. Known: .*chatml, chinese_llama2, deepseek"):
        registry.find("fireflyds.data.templates", "fireflies", "template")


@pytest.mark.parametrize(
    "package",
    ["fireflyds.data.formats", "fireflyds.data.templates", "fireflyds.models.families", "fireflyds.evaluation.tasks"],
)
def test_every_entry_is_found_by_its_file_name(package: str) -> None:
    known = registry.names(package)
    assert known
    for name in known:
        assert registry.find(package, name, "key").__name__ == f"{package}.{name}"
