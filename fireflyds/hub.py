"""Names of models on the Hugging Face Hub and on ModelScope as local folders, and back: the only door to model hubs.

`Qwen/Qwen3-8B`, `Qwen/Qwen3-8B@<branch, tag or commit>` and `ms:Qwen/Qwen3-8B` stand wherever a folder may stand. The
files come from the library's cache, which is filled once per host; without a network the cache alone counts.
`HF_ENDPOINT` names another server.
"""

import os
import re
import sys
import time
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from fireflyds.errors import UserError

MODELSCOPE = "ms:"
_NAME = re.compile(r"(?:ms:)?[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(?:@[\w./-]+)?", re.ASCII)
_CACHED = re.compile(r".*/models--(?P<owner>[^/]+?)--(?P<name>[^/]+)/snapshots/(?P<commit>[0-9a-f]{7,40})/?")
# Code is never run; `convert` searches one, and an export in a maker's layout carries what its config.json names.
_TOKENIZER_FILES = ("*.json", "*.model", "*.jinja", "*.txt", "*.tiktoken", "*.py")
_WEIGHTS = ("*.safetensors", "*.bin")
# Formats of other programs, and copies of the weights in them.
_LEFT_OUT = ("*.gguf", "*.onnx", "*.pth", "*.msgpack", "*.h5", "original/*", "onnx/*", "openvino/*", "coreml/*")
# A folder fetched by one rank of a host counts as fetched for the others for as long.
_FRESH_SECONDS = 600.0


def is_name(value: str) -> bool:
    """True for the name of a model on a hub. What exists here, or stands in a folder that exists here, is a path."""
    if _NAME.fullmatch(value) is None:
        return False
    if value.startswith(MODELSCOPE):
        return True
    return not (Path(value).exists() or Path(value.partition("/")[0]).is_dir())


def localize(config: Any, keys: Sequence[str], *, weights: bool = True) -> None:
    """Replaces the names of models in `keys` (dotted) of a configuration by the folders that hold their files.

    `weights=False`: only configuration and tokenizer are fetched.

    Raises:
        UserError: there is no such model, or the hub cannot be reached and the cache does not have it.
    """
    for key in keys:
        section, _, field = key.rpartition(".")
        owner = attrgetter(section)(config) if section else config
        value = getattr(owner, field)
        if is_name(value):
            setattr(owner, field, str(fetch(value, key, weights=weights and "tokenizer" not in key)))


def fetch(name: str, key: str, *, weights: bool = True) -> Path:
    """Returns the folder with the files of a model; one process of a host asks the hub, the others wait for it.

    Raises:
        UserError: see `localize`.
    """
    from filelock import FileLock
    from huggingface_hub.constants import HF_HUB_CACHE

    locks = Path(HF_HUB_CACHE) / ".fireflyds"
    locks.mkdir(parents=True, exist_ok=True)
    mark = locks / re.sub(r"[^\w.@-]", "_", f"{_endpoint()}_{name}_{'all' if weights else 'small'}")
    with FileLock(f"{mark}.lock"):
        if mark.is_file() and time.time() - mark.stat().st_mtime < _FRESH_SECONDS:
            folder = Path(mark.read_text(encoding="utf-8"))
            if folder.is_dir() and os.environ.get("LOCAL_RANK", "0") != "0":
                return folder
        repository, _, revision = name.removeprefix(MODELSCOPE).partition("@")
        download = _from_modelscope if name.startswith(MODELSCOPE) else _from_hugging_face
        folder = download(repository, revision, key, weights)
        mark.write_text(str(folder), encoding="utf-8")
    print(f"{key}={name}: {folder}", file=sys.stderr, flush=True)
    return folder


def _endpoint() -> str:
    return os.environ.get("HF_ENDPOINT", "https://huggingface.co")


def _from_hugging_face(repository: str, revision: str, key: str, weights: bool) -> Path:
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    value = repository + (f"@{revision}" if revision else "")
    api = huggingface_hub.HfApi(endpoint=_endpoint())
    try:
        patterns = [*_TOKENIZER_FILES, *([_weight_pattern(api, repository, revision)] if weights else [])]
        return Path(
            api.snapshot_download(
                repository, revision=revision or None, allow_patterns=patterns, ignore_patterns=list(_LEFT_OUT)
            )
        )
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError, errors.GatedRepoError) as error:
        is_gated = isinstance(error, errors.GatedRepoError)
        raise UserError(
            "its owner must grant access first"
            if is_gated
            else f"no such file or folder, and no such model or revision at {_endpoint()}",
            key=key,
            value=value,
            remedy=f"Ask at {_endpoint()}/{repository} and log in with `hf auth login`"
            if is_gated
            else "Correct the path or the name; private models need `hf auth login`",
        ) from error
    except (errors.LocalEntryNotFoundError, errors.HfHubHTTPError, httpx.HTTPError, OSError) as error:
        raise UserError(
            f"no such file or folder, and {_endpoint()} cannot be reached to look for a model of that name "
            f"({type(error).__name__})",
            key=key,
            value=value,
            remedy="Correct the path; or fetch the model where there is a network (`hf download`), set HF_ENDPOINT to "
            "a mirror, or give the folder of its files",
        ) from error


def _weight_pattern(api: Any, repository: str, revision: str) -> str:
    """The pattern of the weights: safetensors, or PyTorch's files where there are none."""
    import httpx
    from huggingface_hub import errors, scan_cache_dir

    try:
        files = api.list_repo_files(repository, revision=revision or None)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
        raise
    except (errors.HfHubHTTPError, errors.OfflineModeIsEnabled, httpx.HTTPError, OSError):
        # Without a network: what was fetched when there was one.
        cached = scan_cache_dir().repos
        files = [
            file.file_name
            for cached_repository in cached
            if cached_repository.repo_id == repository
            for version in cached_repository.revisions
            for file in version.files
        ]
    return "*.bin" if files and not any(file.endswith(".safetensors") for file in files) else "*.safetensors"


def _from_modelscope(repository: str, revision: str, key: str, weights: bool) -> Path:
    try:
        from modelscope import snapshot_download
    except ImportError as error:
        raise UserError(
            "names of ModelScope need its library",
            key=key,
            value=MODELSCOPE + repository,
            remedy="pip install 'fireflyds[modelscope]', or give the name on the Hugging Face Hub",
        ) from error
    patterns = [*_TOKENIZER_FILES, *(_WEIGHTS if weights else ())]
    try:
        return Path(snapshot_download(repository, revision=revision or None, allow_patterns=patterns))
    except Exception as error:  # the library raises many kinds
        raise UserError(
            f"ModelScope has no such model, or cannot be reached ({str(error).splitlines()[0][:200]})",
            key=key,
            value=MODELSCOPE + repository,
            remedy="Correct the name, or give the folder of its files",
        ) from error


def name_of(folder: str) -> str:
    """Returns the name on the Hugging Face Hub of a folder in its cache, with the commit; other paths as they are."""
    match = _CACHED.fullmatch(folder)
    return f"{match['owner']}/{match['name']}@{match['commit']}" if match else folder


def push(folder: Path, name: str, *, private: bool) -> str:
    """Uploads a folder as the model `name`, which is made if it does not exist. Returns its address.

    Raises:
        UserError: the hub cannot be reached or refuses the upload.
    """
    import httpx
    import huggingface_hub
    from huggingface_hub import errors

    api = huggingface_hub.HfApi(endpoint=_endpoint())
    try:
        api.create_repo(name, private=private, exist_ok=True)
        api.upload_folder(repo_id=name, folder_path=folder, commit_message="Model exported with fireflyds")
    except (errors.HfHubHTTPError, errors.LocalTokenNotFoundError, httpx.HTTPError, OSError, ValueError) as error:
        raise UserError(
            f"{_endpoint()} did not take it ({str(error).splitlines()[0][:200]}); the directory {folder} is complete",
            key="hub",
            value=name,
            remedy="Log in with `hf auth login` and a token that may write, or upload it later with `hf upload`",
        ) from error
    return f"{_endpoint()}/{name}"
