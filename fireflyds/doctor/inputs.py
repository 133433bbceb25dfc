"""Do tokenizer, token store and base model belong together, and are they whole?"""

import json
import struct
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
from fireflyds.tokenizer.encoder import load_encoder
from fireflyds.tokenizer.shards import shard_names
from fireflyds.types import Encoder

# Seconds that an input may take even where those before it have used up the time of all.
_LEAST_SECONDS = 1.0


def check_all(config: DoctorConfig) -> list[Check]:
    """Of what is given; nothing where nothing is. All together take the timeout, also where their drive is gone."""
    checks: list[Check] = []
    until = time.monotonic() + config.timeout

    def add(name: str, check: Callable[[], Check]) -> None:
        checks.append(_refusals(name, check, max(_LEAST_SECONDS, until - time.monotonic())))

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


def _refusals(name: str, check: Callable[[], Check], seconds: float) -> Check:
    """What a broken file makes a library raise is a finding too, and a drive that does not answer."""
    try:
        return run_with_timeout(seconds, check)
    except UserError as error:
        return error_from(name, error)
    except TimeoutError:
        remedy = "look for a network drive that is gone (df hangs too); where it is only slow, give a longer timeout="
        return failed(name, f"not read within {seconds:.0f} s", remedy)
    except Exception as error:
        found = f"{type(error).__name__}: {(str(error).strip().splitlines() or ['no message'])[0]}"
        return failed(name, found, "a file there is damaged or not what it should be: get it again")


def error_from(name: str, error: UserError) -> Check:
    """A `UserError` says its remedy in its last sentence."""
    found, _, remedy = str(error).rpartition(". ")
    return failed(name, found or remedy, remedy)


def check_tokenizer(path: str, loaded: list[Encoder]) -> Check:
    """Leaves the encoder in `loaded` for the checks that compare with it."""
    loaded.append(load_encoder(path))
    return passed("tokenizer", f"{path}: {loaded[0].vocab_size:,} pieces, {loaded[0].fingerprint()[:12]}")


def check_base(config: DoctorConfig, encoder: Encoder) -> Check:
    """Rows of the embeddings against pieces of the tokenizer, special ids, and whether this machine suits its format."""
    asked = ModelConfig(init=ModelInit.pretrained, path=config.model, tokenizer=config.tokenizer)
    hf_config: Any = read_config(asked, encoder)
    family_of(hf_config.model_type)
    rows, pieces = hf_config.vocab_size, encoder.vocab_size
    about = f"{config.model}: {hf_config.model_type}, {rows:,} rows for {pieces:,} pieces"
    ours = {"bos_token_id": encoder.bos_id, "eos_token_id": encoder.eos_id}
    theirs = {name: getattr(hf_config, name, None) for name in ours}
    apart = [
        f"{name} is {theirs[name]} in config.json and {value} in the tokenizer"
        for name, value in ours.items()
        if theirs[name] is not None and value is not None and value not in _as_list(theirs[name])
    ]
    if apart:
        remedy = "generation may not stop: mend config.json, or give the tokenizer that belongs to the model"
        return warning("base", f"{about}; {'; '.join(apart)}", remedy)
    old_gpu = torch.cuda.is_available() and not has_bf16(dispatch.capability_of(torch.device("cuda", 0)))
    if old_gpu and hf_config.dtype == torch.bfloat16:
        remedy = "it may overflow: watch loss_scale, prefer tuning=lora or qlora, or train it on sm_80 or newer"
        return warning("base", f"{about}; trained in bf16, this GPU has only fp16", remedy)
    return passed("base", about)


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_store(folder: str, tokenizer: str, encoder: Encoder | None) -> Check:
    """Whole, and made with this tokenizer: ids of another are other words."""
    store = TokenStore(folder, "data")
    about = f"{folder}: {len(store):,} documents, {store.num_tokens:,} tokens"
    made_with = store.manifest["made_from"]["tokenizer"]
    if encoder is None:
        if tokenizer:
            return failed(
                "store", f"{about}; its tokenizer cannot be compared with {tokenizer}", "see `tokenizer` above"
            )
        remedy = "give tokenizer= or model= too"
        return warning("store", f"{about}, made with tokenizer {made_with[:12]}, which was not compared", remedy)
    if made_with != encoder.fingerprint():
        found = (
            f"{about}, made with another tokenizer ({made_with[:12]}) than {tokenizer} ({encoder.fingerprint()[:12]})"
        )
        return failed(
            "store",
            found,
            f"python launch/prepare.py tokenizer={tokenizer} ..., or give the tokenizer it was made with",
        )
    return passed("store", f"{about}, made with this tokenizer")


def check_weights(folder: Path) -> Check:
    """Every shard that the index names is there, and as long as its header says: a broken download is shorter."""
    names = weight_files(folder)
    if not names:
        raise UserError(
            f"model={folder}: no weights there. Give the directory of a Hugging Face model with its weights"
        )
    if missing := [name for name in names if not (folder / name).is_file()]:
        raise UserError(f"model={folder}: {', '.join(missing)} missing of {len(names)} files. Get the missing files")
    if not names[0].endswith(".safetensors"):
        if empty := [name for name in names if not (folder / name).stat().st_size]:
            raise UserError(f"model={folder}: {', '.join(empty)} empty. Get the file again")
        more = f" and {len(names) - 3} more" * (len(names) > 3)
        found = f"{folder}: {', '.join(names[:3])}{more} (not safetensors, their lengths are not known)"
        return passed("weights", found)
    short = [name for name in names if (folder / name).stat().st_size != expected_size(folder / name)]
    if short:
        raise UserError(f"model={folder}: {', '.join(short)} not as long as its header says. Get the file again")
    size = sum((folder / name).stat().st_size for name in names)
    return passed("weights", f"{folder}: {len(names)} file{'s' * (len(names) > 1)}, {size / (1 << 30):.2f} GiB, whole")


def weight_files(folder: Path) -> list[str]:
    """Names of what transformers loads, in its order of preference; whether shards of an index are there is not asked."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        index = folder / f"{whole}.index.json"
        if (folder / whole).is_file():
            return [whole]
        if not index.is_file():
            continue
        return shard_names(index)
    return []


def expected_size(file: Path) -> int:
    """Bytes a safetensors file must have: 8, the header, and up to the last tensor's end. -1 without a header."""
    with file.open("rb") as stream:
        head = stream.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
        if not 0 < length <= file.stat().st_size - 8:
            return -1
        try:
            header = json.loads(stream.read(length))
        except ValueError:
            return -1
    ends = (entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    return int(8 + length + max(ends, default=0))
