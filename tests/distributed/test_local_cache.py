"""Base and store on the host's own disk: copied once, read from there, and whole or absent."""

import json
import os
import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from fireflyds import app
from fireflyds.data.store.store import TokenStore
from fireflyds.distributed import local_cache
from fireflyds.errors import UserError


@pytest.fixture
def alone(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "base"
    folder.mkdir()
    for name in ("config.json", "model.safetensors", "pytorch_model.bin", "README.md", "tokenizer.model"):
        (folder / name).write_text(f"this is {name}")
    (folder / "original").mkdir()
    return folder


@pytest.fixture
def store(tmp_path: Path, verb, base_tokenizer: Path) -> TokenStore:
    (tmp_path / "en.txt").write_text("one two three\nfour five six\n")
    verb("prepare", "data=en.txt", f"tokenizer={base_tokenizer}", "out=store", "workers=1")
    return TokenStore(tmp_path / "store")


def test_base_and_store_are_copied_once_and_read_from_there(alone, base: Path, store: TokenStore, tmp_path) -> None:
    config = app.compose(
        "train",
        ["run=r", f"model={base}", f"data={store.path}", "optim.steps=1", f"hardware.local_cache={tmp_path}/disk"],
    )
    said: list[str] = []
    here, copied = local_cache.stage_inputs(config, "0123456789abcdef01", store, said.append)
    folder = tmp_path / "disk" / "base-0123456789abcdef"
    assert here.model.path == str(folder)
    assert config.model.path == str(base)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert (folder / "model.safetensors").read_text() == "this is model.safetensors"
    assert copied.path.parent == tmp_path / "disk"
    assert copied.num_tokens == store.num_tokens > 0
    assert copied.ids(0, 0, 3).tolist() == store.ids(0, 0, 3).tolist()
    assert said[0].startswith(f"base-0123456789abcdef was copied from {base} to {folder} (local_cache, 0.00 GiB)")
    assert said[1].startswith(f"{copied.path.name} was copied from {store.path} to {copied.path} (local_cache")
    stamp = (folder / "config.json").stat().st_mtime_ns
    again, _ = local_cache.stage_inputs(config, "0123456789abcdef01", store, said.append)
    assert again.model.path == str(folder)
    assert said[2:] == [
        f"base-0123456789abcdef is read from {folder} (local_cache)",
        f"{copied.path.name} is read from {copied.path} (local_cache)",
    ]
    assert (folder / "config.json").stat().st_mtime_ns == stamp


def test_without_a_cache_everything_is_read_where_it_is(base: Path, store: TokenStore) -> None:
    config = app.compose("train", ["run=r", f"model={base}", f"data={store.path}", "optim.steps=1"])
    assert local_cache.stage_inputs(config, "hash", store, print) == (config, store)


def test_no_space_is_said_before_anything_is_copied(alone, base: Path, store, tmp_path, monkeypatch) -> None:
    config = app.compose(
        "train",
        ["run=r", f"model={base}", f"data={store.path}", "optim.steps=1", f"hardware.local_cache={tmp_path}/disk"],
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda place: SimpleNamespace(free=20))
    with pytest.raises(
        UserError,
        match=(
            rf"^{os.uname().nodename}: hardware.local_cache={tmp_path}/disk: base-hash needs 0.00 GiB, 0.00 GiB "
            r"are free"
        ),
    ):
        local_cache.stage_inputs(config, "hash", store, print)
    assert [path.name for path in (tmp_path / "disk").iterdir()] == [".base-hash.lock"]
    monkeypatch.undo()
    (tmp_path / "file").touch()
    config.hardware.local_cache = str(tmp_path / "file")
    with pytest.raises(UserError, match="Give a folder on every host's disk that can be written"):
        local_cache.stage_inputs(config, "hash", store, print)


def test_old_weights_are_taken_where_they_are_all(base: Path) -> None:
    assert "pytorch_model.bin" not in local_cache.model_files(base)
    (base / "model.safetensors").unlink()
    assert "pytorch_model.bin" in local_cache.model_files(base)


def test_ranks_of_a_host_wait_for_the_one_that_copies(base: Path, tmp_path: Path, monkeypatch) -> None:
    said: list[str] = []
    begun, go = threading.Event(), threading.Event()
    real = shutil.copyfile

    def slow(*names):
        begun.set()
        assert go.wait(20)
        return real(*names)

    monkeypatch.setattr(shutil, "copyfile", slow)
    files = local_cache.model_files(base)
    threads = [
        threading.Thread(target=local_cache.copy_once, args=(tmp_path / "disk", "base-x", base, files, said.append))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert begun.wait(20)
    assert not (tmp_path / "disk" / "base-x").exists()
    go.set()
    for thread in threads:
        thread.join(20)
    assert sorted("copied" in line for line in said) == [False, False, True]


def test_a_copy_that_a_power_cut_left_short_is_made_again(base: Path, tmp_path: Path) -> None:
    files, said = local_cache.model_files(base), []
    folder = local_cache.copy_once(tmp_path / "disk", "base-x", base, files, said.append)
    (folder / "model.safetensors").write_text("")
    local_cache.copy_once(tmp_path / "disk", "base-x", base, files, said.append)
    assert (folder / "model.safetensors").read_text() == "this is model.safetensors"
    local_cache.copy_once(tmp_path / "disk", "base-x", base, files, said.append)
    assert ["copied" in line for line in said] == [True, True, False]


def test_a_copy_that_was_broken_off_is_made_again(base: Path, tmp_path: Path) -> None:
    broken = tmp_path / "disk" / ".base-x.partial"
    broken.mkdir(parents=True)
    (broken / "model.safetensors").write_text("th")
    folder = local_cache.copy_once(tmp_path / "disk", "base-x", base, local_cache.model_files(base), print)
    assert (folder / "model.safetensors").read_text() == "this is model.safetensors"
    assert not broken.exists()


def test_a_store_whose_manifest_names_a_part_outside_it_is_refused(store: TokenStore) -> None:
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["parts"][0]["key"] = "../../victim"
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"names the file '../../victim', which is no plain file name"):
        TokenStore(store.path)
