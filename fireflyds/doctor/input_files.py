"""Checks that tokenizer, token store and base model are complete and match each other."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from fireflyds_kernels import dispatch

from fireflyds.config import DoctorConfig, ModelConfig, ModelInit
from fireflyds.data.store.store import TokenStore
from fireflyds.distributed.timeouts import run_with_timeout
from fireflyds.doctor.check import Check, failed, passed, warning
from fireflyds.errors import UserError
from fireflyds.models.load import family_of, read_config
from fireflyds.models.precision import has_bf16
from fireflyds.runs.fingerprint import read_safetensors_header
from fireflyds.tokenizer.auto_tokenizer import compare
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.shards import shard_names
from fireflyds.types import Encoder

# Minimum timeout of one input in seconds, where earlier inputs have used up the common timeout.
_LEAST_SECONDS = 1.0


def check_all(config: DoctorConfig) -> list[Check]:
    """Checks the configured inputs. All of them share one timeout, also where their drive is unreachable."""
    checks: list[Check] = []
    deadline = time.monotonic() + config.timeout

    def add(name: str, check: Callable[[], Check]) -> None:
        checks.append(_run_check(name, check, max(_LEAST_SECONDS, deadline - time.monotonic())))

    path = config.tokenizer or config.model
    loaded: list[Encoder] = []
    if path:
        add("tokenizer", lambda: check_tokenizer(path, loaded))
    encoder = loaded[0] if loaded else None
    if config.model:
        add("weights", lambda: check_weights(Path(config.model)))
        if encoder is not None:
            add("base", lambda: check_base(config, encoder))
    if config.data:
        add("store", lambda: check_store(config.data, path, encoder))
    return checks


def _run_check(name: str, check: Callable[[], Check], seconds: float) -> Check:
    """Runs a check; exceptions (damaged files) and timeouts (unreachable drives) become failed checks."""
    try:
        return run_with_timeout(seconds, check)
    except UserError as error:
        return error_from(name, error)
    except TimeoutError:
        remedy = "check for an unreachable network drive (df hangs as well); if it is only slow, increase timeout="
        return failed(name, f"not read within {seconds:.0f} s", remedy)
    except Exception as error:
        message = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        return failed(name, message, "a file is damaged or has an unexpected format: download or create it again")


def error_from(name: str, error: UserError) -> Check:
    """Returns the failed check of a `UserError`."""
    return failed(name, error.finding, error.remedy)


def check_tokenizer(path: str, loaded: list[Encoder]) -> Check:
    """Loads the tokenizer and appends its encoder to `loaded`, for later checks."""
    encoder = load_encoder(path)
    loaded.append(encoder)
    summary = f"{path}: {encoder.vocab_size:,} pieces, {encoder.fingerprint()[:12]}"
    if encoder.unknown_id is not None:
        remedy = "expand it with add_bytes=true, or take another base"
        return warning("tokenizer", f"{summary}; no byte fallback: characters that it lacks are lost", remedy)
    difference = compare(Path(path), encoder) if Path(path).is_dir() else None
    if difference:
        remedy = "training uses the files' ids; export writes them such that AutoTokenizer agrees"
        return warning("tokenizer", f"{summary}; {difference}", remedy)
    return passed("tokenizer", summary)


def check_base(config: DoctorConfig, encoder: Encoder) -> Check:
    """Compares embedding rows with tokenizer pieces, and special ids; checks that the GPU supports the dtype."""
    model_config = ModelConfig(init=ModelInit.pretrained, path=config.model, tokenizer=config.tokenizer)
    hf_config: Any = read_config(model_config, encoder, "model")
    family_of(hf_config)
    text_config = hf_config.get_text_config()
    rows, pieces = text_config.vocab_size, encoder.vocab_size
    summary = f"{config.model}: {hf_config.model_type}, {rows:,} rows for {pieces:,} pieces"
    tokenizer_ids = {"bos_token_id": encoder.bos_id, "eos_token_id": encoder.eos_id}
    config_ids = {name: getattr(text_config, name, None) for name in tokenizer_ids}
    mismatches = [
        f"{name} is {config_ids[name]} in config.json and {value} in the tokenizer"
        for name, value in tokenizer_ids.items()
        if config_ids[name] is not None and value is not None and value not in _as_list(config_ids[name])
    ]
    if mismatches:
        remedy = "generation may not stop: correct config.json, or give the tokenizer of the model"
        return warning("base", f"{summary}; {'; '.join(mismatches)}", remedy)
    old_gpu = torch.cuda.is_available() and not has_bf16(dispatch.capability_of(torch.device("cuda", 0)))
    if old_gpu and hf_config.dtype == torch.bfloat16:
        remedy = "fp16 may overflow: monitor loss_scale, prefer tuning=lora or qlora, or train it on sm_80 or newer"
        return warning("base", f"{summary}; trained in bf16, this GPU supports only fp16", remedy)
    return passed("base", summary)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_store(folder: str, tokenizer: str, encoder: Encoder | None) -> Check:
    """Checks that the store is complete and was made with this tokenizer: token ids depend on the tokenizer."""
    store = TokenStore(folder, "data")
    summary = f"{folder}: {len(store):,} documents, {store.num_tokens:,} tokens"
    store_fingerprint = store.manifest["made_from"]["tokenizer"]
    if encoder is None:
        if tokenizer:
            return failed(
                "store", f"{summary}; its tokenizer cannot be compared with {tokenizer}", "see `tokenizer` above"
            )
        remedy = "also give tokenizer= or model="
        return warning(
            "store", f"{summary}, made with tokenizer {store_fingerprint[:12]}, which was not compared", remedy
        )
    if store_fingerprint != encoder.fingerprint():
        message = (
            f"{summary}, made with another tokenizer ({store_fingerprint[:12]}) than {tokenizer} "
            f"({encoder.fingerprint()[:12]})"
        )
        return failed(
            "store",
            message,
            f"python launch/prepare.py tokenizer={tokenizer} ..., or give the tokenizer it was made with",
        )
    return passed("store", f"{summary}, made with this tokenizer")


def check_weights(folder: Path) -> Check:
    """Checks that every shard of the index exists and has the length of its header (a partial download is shorter)."""
    names = weight_files(folder)
    if not names:
        raise UserError(
            "no weights there",
            key="model",
            value=folder,
            remedy="Give the directory of a Hugging Face model with its weights",
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(
            f"{', '.join(missing)} missing of {len(names)} files", key="model", value=folder, remedy="Download them"
        )
    if not names[0].endswith(".safetensors"):
        if empty := [name for name in names if not (folder / name).stat().st_size]:
            raise UserError(f"{', '.join(empty)} empty", key="model", value=folder, remedy="Download the file again")
        suffix = f" and {len(names) - 3} more" * (len(names) > 3)
        message = f"{folder}: {', '.join(names[:3])}{suffix} (not safetensors, their lengths are not known)"
        return passed("weights", message)
    for name in names:
        read_safetensors_header(folder / name)
    size = sum((folder / name).stat().st_size for name in names)
    return passed("weights", f"{folder}: {len(names)} file{'s' * (len(names) > 1)}, {size / (1 << 30):.2f} GiB, intact")


def weight_files(folder: Path) -> list[str]:
    """Names of the weight files that transformers loads, by its preference; shards of an index may be missing."""
    for name in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{name}.index.json"
        if (folder / name).is_file():
            return [name]
        if not index.is_file():
            continue
        return shard_names(index)
    return []
