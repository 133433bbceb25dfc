from pathlib import Path

import pytest

from fireflyds.directories import write_aside, write_whole
from fireflyds.errors import UserError


def test_a_folder_is_replaced_only_when_the_new_one_is_whole(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with write_aside(out, marker="m") as folder:
        (folder / "m").write_text("1")
        (folder / "old").touch()
    with pytest.raises(ZeroDivisionError), write_aside(out, marker="m") as folder:
        (folder / "m").write_text(str(1 / 0))
    assert (out / "m").read_text() == "1"
    with write_aside(out, marker="m") as folder:
        (folder / "m").write_text("3")
    assert [path.name for path in out.iterdir()] == ["m"]
    assert (out / "m").read_text() == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with write_aside(tmp_path / "link", marker="m") as folder:
        (folder / "m").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "m").exists()


def test_other_things_are_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with (
        pytest.raises(UserError, match=r"holds other things \(no export.json\)"),
        write_aside(tmp_path / "model", marker="export.json"),
    ):
        raise AssertionError("not reached")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file of that name is there"), write_aside(tmp_path / "file", marker="m"):
        raise AssertionError("not reached")
    assert (tmp_path / "model" / "config.json").read_text() == "{}"


def test_text_files_are_whole(tmp_path: Path) -> None:
    write_whole(tmp_path / "a.json", "中文")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "中文"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
