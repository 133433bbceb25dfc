"""Names of models on a hub become folders: once per host, from the cache without a network; exports are uploaded."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import COMMIT, hub_server
from samples import ENGLISH

from fireflyds import hub
from fireflyds.testing.models import save_tiny_llama

CODE = "import sys; from fireflyds import hub; print(hub.fetch(sys.argv[1], 'model', weights=sys.argv[2] == 'all'))"


@pytest.fixture
def served(tmp_path: Path, base_tokenizer: Path) -> Iterator[tuple[dict[str, str], list[str], Path]]:
    """A hub with the model `zh/tiny`; the environment that leads to it, its requests, and its folder."""
    folder = tmp_path / "hub" / "zh" / "tiny"
    save_tiny_llama(folder, vocab_size=400)
    for name in ("tokenizer.model", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((base_tokenizer / name).read_bytes())
    (folder / "pytorch_model.bin").write_bytes(b"old")
    (folder / "model.gguf").write_bytes(b"other")
    with hub_server(tmp_path / "hub") as (address, requests):
        names = {"HF_ENDPOINT": address, "HF_HOME": str(tmp_path / "home"), "HF_TOKEN": "hf_secret"}
        yield {**os.environ, **names, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}, requests, folder


def fetched(environment: dict[str, str], name: str, what: str = "all") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", CODE, name, what], env=environment, capture_output=True, text=True, timeout=120
    )


def test_a_model_is_fetched_by_name_with_the_weights_it_needs(served) -> None:
    environment, requests, source = served
    small = Path(fetched(environment, "zh/tiny", "small").stdout.strip())
    assert {file.name for file in small.iterdir()} >= {"config.json", "tokenizer.json", "tokenizer.model"}
    assert not (small / "model.safetensors").exists()
    folder = Path(fetched(environment, "zh/tiny@v1").stdout.strip())
    assert (folder / "model.safetensors").read_bytes() == (source / "model.safetensors").read_bytes()
    assert not (folder / "pytorch_model.bin").exists()
    assert not (folder / "model.gguf").exists()
    assert hub.name_of(str(folder)) == f"zh/tiny@{COMMIT}"
    before = len(requests)
    assert fetched(environment | {"LOCAL_RANK": "1"}, "zh/tiny@v1").stdout.strip() == str(folder)
    assert len(requests) == before  # another rank of the host


def test_without_a_network_the_cache_counts(served) -> None:
    environment, _, _ = served
    folder = fetched(environment, "zh/tiny").stdout
    dead = environment | {"HF_ENDPOINT": "http://127.0.0.1:9"}
    again = fetched(dead, "zh/tiny")
    assert again.stdout == folder, again.stderr
    assert fetched(environment | {"HF_HUB_OFFLINE": "1"}, "zh/tiny").stdout == folder
    missing = fetched(dead, "zh/other").stderr
    assert "http://127.0.0.1:9 cannot be reached to look for a model of that name" in missing


def test_names_that_do_not_exist_are_told(served) -> None:
    environment, _, _ = served
    assert "no such model or revision at http" in fetched(environment, "zh/none").stderr
    assert "no such model or revision at http" in fetched(environment, "zh/tiny@v9").stderr
    assert "pip install 'fireflyds[modelscope]'" in fetched(environment, "ms:zh/tiny").stderr


def test_paths_are_no_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    names = ["Qwen/Qwen3-8B", "Qwen/Qwen3-8B@main", "ms:Qwen/Qwen3-8B"]
    paths = ["models/llama", "llama", "a/b/c", "./a/b", "/a/b", "", "a/b c"]
    assert [name for name in (*names, *paths) if hub.is_name(name)] == names


@pytest.mark.slow
def test_verbs_take_names_and_an_export_is_uploaded(served, verb, tmp_path: Path) -> None:
    environment, _, _ = served
    (tmp_path / "en.txt").write_text("\n".join(ENGLISH), encoding="utf-8")
    verb("prepare", "data=en.txt", "tokenizer=zh/tiny", "out=store", env=environment)
    run = ["run=r", "model=zh/tiny@main", "data=store", "optim.steps=2", "seq_len=32", "global_batch_size=2"]
    verb("train", *run, "micro_batch_size=1", "tracking=none", env=environment)
    exported = verb("export", "run=r", "hub=zh/better", env=environment)
    assert f"uploaded to {environment['HF_ENDPOINT']}/zh/better" in exported.stdout
    pushed = tmp_path / "hub" / "zh" / "better"
    assert (pushed / "model.safetensors").read_bytes() == (tmp_path / "runs/r/export/model.safetensors").read_bytes()
    assert "base_model: zh/tiny" in (pushed / "README.md").read_text()
    refused = verb("export", "run=r", "hub=zh/worse", env=environment | {"HF_TOKEN": "hf_wrong"}, check=False)
    assert refused.returncode == 2
    assert "did not take it" in refused.stderr
    assert "hf auth login" in refused.stderr
