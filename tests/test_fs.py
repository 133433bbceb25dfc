"""Output folders are complete or absent, and no file that fireflyds did not write is lost."""

import threading
from pathlib import Path

import pytest

from fireflyds.errors import UserError
from fireflyds.fs import (
    MARKER,
    Output,
    atomic_dir,
    atomic_write_text,
    lock_file,
    plain_file_name,
    resumable_dir,
)

EXPORT = Output("export")
# Names of files that verbs write and that users may use too.
COMMON_NAMES = (
    "report.json",
    "export.json",
    "learn.json",
    "about.json",
    "comparison.json",
    "manifest.json",
    "trained.json",
)


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_folder_is_replaced_only_by_a_complete_one(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_dir(out, EXPORT) as folder:
        (folder / "m").write_text("1")
        (folder / "old").touch()
    with pytest.raises(ZeroDivisionError), atomic_dir(out, EXPORT) as folder:
        (folder / "m").write_text(str(1 / 0))
    assert (out / "m").read_text() == "1"
    with atomic_dir(out, EXPORT) as folder:
        (folder / "m").write_text("3")
    assert names(out) == [MARKER, "m"]
    assert (out / "m").read_text() == "3"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_link_is_followed(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    with atomic_dir(tmp_path / "link", EXPORT) as folder:
        (folder / "m").touch()
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "m").exists()


@pytest.mark.parametrize("name", COMMON_NAMES)
def test_a_folder_with_only_a_common_file_name_is_not_replaced(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / name).write_text("{}")
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds other things"), atomic_dir(folder, EXPORT):
        raise AssertionError("not reached")
    with pytest.raises(UserError, match="holds other things"), resumable_dir(folder, Output("prepare"), pieces="parts"):
        raise AssertionError("not reached")
    assert names(folder) == sorted([name, "thesis.txt"])


@pytest.mark.parametrize("content", ["{}", "[]", "not json", '{"written_by": "me", "kind": "export", "files": ["a"]}'])
def test_a_marker_with_other_content_is_not_accepted(tmp_path: Path, content: str) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / MARKER).write_text(content)
    (tmp_path / "out" / "a").touch()
    with pytest.raises(UserError, match="holds other things"), atomic_dir(tmp_path / "out", EXPORT):
        raise AssertionError("not reached")
    assert names(tmp_path / "out") == [MARKER, "a"]


def test_the_output_of_another_verb_is_not_replaced(tmp_path: Path) -> None:
    with atomic_dir(tmp_path / "out", EXPORT) as folder:
        (folder / "config.json").touch()
    with (
        pytest.raises(UserError, match="holds the output of export, not prepare"),
        resumable_dir(tmp_path / "out", Output("prepare"), pieces="parts"),
    ):
        raise AssertionError("not reached")


def test_files_added_to_an_output_are_kept(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_dir(out, EXPORT) as folder:
        (folder / "weights").write_text("1")
    (out / "eval").mkdir()
    (out / "eval" / "scores.json").write_text("0.5")
    (out / "notes.txt").write_text("mine")
    for _ in range(2):
        with atomic_dir(out, EXPORT) as folder:
            (folder / "weights").write_text("2")
        assert names(out) == [MARKER, "eval/scores.json", "notes.txt", "weights"]
    assert (out / "notes.txt").read_text() == "mine"
    with pytest.raises(UserError, match=r"notes\.txt was not written by fireflyds"), atomic_dir(out, EXPORT) as folder:
        (folder / "notes.txt").write_text("ours")
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "weights").read_text() == "2"


def test_caches_of_later_verbs_are_removed_with_a_replaced_output(tmp_path: Path) -> None:
    store = Output("prepare", caches=("plans",))
    with atomic_dir(tmp_path / "out", store) as folder:
        (folder / "manifest.json").touch()
    (tmp_path / "out" / "plans").mkdir()
    (tmp_path / "out" / "plans" / "order.npy").touch()
    with atomic_dir(tmp_path / "out", store) as folder:
        (folder / "manifest.json").touch()
    assert names(tmp_path / "out") == [MARKER, "manifest.json"]


def test_a_replacement_killed_between_its_renames_is_rolled_back(tmp_path: Path) -> None:
    out = tmp_path / "out"
    with atomic_dir(out, EXPORT) as folder:
        (folder / "weights").write_text("1")
    (out / "notes.txt").write_text("mine")
    out.rename(tmp_path / ".out.old")
    with pytest.raises(ZeroDivisionError), atomic_dir(out, EXPORT):
        raise ZeroDivisionError
    assert names(out) == [MARKER, "notes.txt", "weights"]


def test_a_foreign_partial_folder_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / ".out.partial").mkdir()
    (tmp_path / ".out.partial" / "mine").touch()
    with pytest.raises(UserError, match=r"\.out\.partial holds other things"), atomic_dir(tmp_path / "out", EXPORT):
        raise AssertionError("not reached")
    assert (tmp_path / ".out.partial" / "mine").exists()


def test_an_existing_file_at_the_output_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="a file of that name is there"), atomic_dir(tmp_path / "file", EXPORT):
        raise AssertionError("not reached")


def test_a_refused_replacement_succeeds_after_the_conflict_is_removed(tmp_path: Path) -> None:
    """The conflicting file is detected after the output is written; without it the same command succeeds."""
    with resumable_dir(tmp_path / "out", EXPORT, pieces="parts") as folder:
        (folder / "weights").touch()
    (tmp_path / "out" / "notes").touch()

    def write_output() -> None:
        with resumable_dir(tmp_path / "out", EXPORT, pieces="parts") as folder:
            (folder / "parts" / "one").touch()
            (folder / "notes").touch()

    with pytest.raises(UserError, match="notes was not written by fireflyds and would be replaced"):
        write_output()
    (tmp_path / "out" / "notes").unlink()
    write_output()
    assert names(tmp_path / "out") == [MARKER, "notes", "parts/one"]


@pytest.mark.parametrize("leftover", [".fireflyds.partial", MARKER])
def test_a_partial_folder_of_a_killed_process_is_replaced(tmp_path: Path, leftover: str) -> None:
    (tmp_path / ".out.partial").mkdir()
    for name in ("weights", leftover):
        (tmp_path / ".out.partial" / name).touch()
    with atomic_dir(tmp_path / "out", EXPORT) as folder:
        (folder / "new").touch()
    assert names(tmp_path / "out") == [MARKER, "new"]


def test_text_files_are_written_atomically(tmp_path: Path) -> None:
    atomic_write_text(tmp_path / "a.json", "中文")
    assert (tmp_path / "a.json").read_text(encoding="utf-8") == "中文"
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.parametrize("name", ["../x", "/etc/x", "a/b", "..", ".", "", "a\\b", "a\0", None, 3])
def test_only_plain_file_names_are_accepted(tmp_path: Path, name: object) -> None:
    with pytest.raises(UserError, match="no plain file name"):
        plain_file_name(name, tmp_path / "model.safetensors.index.json")
    assert plain_file_name("model-00001-of-00002.safetensors", tmp_path) == "model-00001-of-00002.safetensors"


def test_writers_exclude_each_other_although_they_remove_the_lock_file(tmp_path: Path) -> None:
    """Writers remove their lock file; a writer that opened the removed file must not treat it as the lock."""
    active_writers, max_active_writers, lock = 0, 0, threading.Lock()
    messages: list[str] = []

    def write() -> None:
        nonlocal active_writers, max_active_writers
        finished = 0
        while finished < 15:
            try:
                with atomic_dir(tmp_path / "out", EXPORT) as folder:
                    with lock:
                        active_writers += 1
                        max_active_writers = max(max_active_writers, active_writers)
                    (folder / "a").touch()
                    with lock:
                        active_writers -= 1
                finished += 1
            except UserError as error:
                messages.append(str(error))

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    assert max_active_writers == 1
    assert all("another process writes there now" in message for message in messages)


def test_a_lock_is_released_by_close(tmp_path: Path) -> None:
    with lock_file(tmp_path / "lock", UserError("busy")), pytest.raises(UserError, match="^busy$"):
        lock_file(tmp_path / "lock", UserError("busy"))
    lock_file(tmp_path / "lock", UserError("busy")).close()
