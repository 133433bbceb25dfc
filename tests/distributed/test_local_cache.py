"""Base and store on the host's own disk: copied once, read from there, and either complete or absent."""

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
def single_process_group(tmp_path: Path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
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


def test_base_and_store_are_copied_once_and_read_from_there(
    single_process_group, base: Path, store: TokenStore, tmp_path
) -> None:
    config = app.compose(
        "train",
        ["run=r", f"model={base}", f"data={store.path}", "optim.steps=1", f"hardware.local_cache={tmp_path}/disk"],
    )
    log_lines: list[str] = []
    staged_config, staged_store = local_cache.stage_inputs(config, "0123456789abcdef01", store, log_lines.append)
    folder = tmp_path / "disk" / "base-0123456789abcdef"
    assert staged_config.model.path == str(folder)
    assert config.model.path == str(base)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors", "tokenizer.model"]
    assert (folder / "model.safetensors").read_text() == "this is model.safetensors"
    assert staged_store.path.parent == tmp_path / "disk"
    assert staged_store.num_tokens == store.num_tokens > 0
    assert staged_store.ids(0, 0, 3).tolist() == store.ids(0, 0, 3).tolist()
    assert log_lines[0].startswith(f"base-0123456789abcdef was copied from {base} to {folder} (local_cache, 0.00 GiB)")
    assert log_lines[1].startswith(
        f"{staged_store.path.name} was copied from {store.path} to {staged_store.path} (local_cache"
    )
    modified_ns = (folder / "config.json").stat().st_mtime_ns
    second_config, _ = local_cache.stage_inputs(config, "0123456789abcdef01", store, log_lines.append)
    assert second_config.model.path == str(folder)
    assert log_lines[2:] == [
        f"base-0123456789abcdef is read from {folder} (local_cache)",
        f"{staged_store.path.name} is read from {staged_store.path} (local_cache)",
    ]
    assert (folder / "config.json").stat().st_mtime_ns == modified_ns


def test_without_a_cache_inputs_are_not_copied(base: Path, store: TokenStore) -> None:
    config = app.compose("train", ["run=r", f"model={base}", f"data={store.path}", "optim.steps=1"])
    assert local_cache.stage_inputs(config, "hash", store, print) == (config, store)


def test_insufficient_space_is_reported_before_the_copy(
    single_process_group, base: Path, store, tmp_path, monkeypatch
) -> None:
    config = app.compose(
        "train",
        ["run=r", f"model={base}", f"data={store.path}", "optim.steps=1", f"hardware.local_cache={tmp_path}/disk"],
    )
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=20))
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


def test_pytorch_weights_are_copied_only_without_safetensors(base: Path) -> None:
    assert "pytorch_model.bin" not in local_cache.model_files(base)
    (base / "model.safetensors").unlink()
    assert "pytorch_model.bin" in local_cache.model_files(base)


def test_ranks_of_a_host_wait_for_the_one_that_copies(base: Path, tmp_path: Path, monkeypatch) -> None:
    log_lines: list[str] = []
    copy_started, copy_allowed = threading.Event(), threading.Event()
    copyfile = shutil.copyfile

    def delayed_copyfile(*names):
        copy_started.set()
        assert copy_allowed.wait(20)
        return copyfile(*names)

    monkeypatch.setattr(shutil, "copyfile", delayed_copyfile)
    files = local_cache.model_files(base)
    threads = [
        threading.Thread(
            target=local_cache.copy_once, args=(tmp_path / "disk", "base-x", base, files, log_lines.append)
        )
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    assert copy_started.wait(20)
    assert not (tmp_path / "disk" / "base-x").exists()
    copy_allowed.set()
    for thread in threads:
        thread.join(20)
    assert sorted("copied" in line for line in log_lines) == [False, False, True]


def test_a_truncated_copy_is_made_again(base: Path, tmp_path: Path) -> None:
    files, log_lines = local_cache.model_files(base), []
    folder = local_cache.copy_once(tmp_path / "disk", "base-x", base, files, log_lines.append)
    (folder / "model.safetensors").write_text("")
    local_cache.copy_once(tmp_path / "disk", "base-x", base, files, log_lines.append)
    assert (folder / "model.safetensors").read_text() == "this is model.safetensors"
    local_cache.copy_once(tmp_path / "disk", "base-x", base, files, log_lines.append)
    assert ["copied" in line for line in log_lines] == [True, True, False]


def test_an_interrupted_copy_is_made_again(base: Path, tmp_path: Path) -> None:
    partial_folder = tmp_path / "disk" / ".base-x.partial"
    partial_folder.mkdir(parents=True)
    (partial_folder / "model.safetensors").write_text("th")
    folder = local_cache.copy_once(tmp_path / "disk", "base-x", base, local_cache.model_files(base), print)
    assert (folder / "model.safetensors").read_text() == "this is model.safetensors"
    assert not partial_folder.exists()


def test_a_store_whose_manifest_names_a_part_outside_it_is_refused(store: TokenStore) -> None:
    manifest = json.loads((store.path / "manifest.json").read_text())
    manifest["parts"][0]["key"] = "../../victim"
    (store.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"names the file '../../victim', which is no plain file name"):
        TokenStore(store.path)
