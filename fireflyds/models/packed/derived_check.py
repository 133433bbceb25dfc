"""The packing of a derived family is compared with single documents before it is used, on a small model of its kind."""

import copy
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from fireflyds import registry
from fireflyds.config import Precision
from fireflyds.errors import UserError, describe
from fireflyds.fs import atomic_write_text
from fireflyds.models.architecture import head_dim, layer_configs
from fireflyds.models.derived_family import FAMILIES
from fireflyds.models.load import bare_model
from fireflyds.models.packed.equivalence import ImplementationResult, compare_implementations, table
from fireflyds.models.precision import DTYPES
from fireflyds.models.text_model import build, is_wrapper

# Documents of one token, one block, and more than the windows below.
LENGTHS = [7, 1, 130, 64, 300]
# What of an architecture may be small without another computation: widths, counts of experts, lengths of windows.
_SMALL = {
    "vocab_size": 512, "vocab_size_per_layer_input": 512, "intermediate_size": 96, "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 32, "ffn_dim": 96, "n_inner": 96, "num_experts": 4, "num_local_experts": 4,
    "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2, "moe_k": 2, "moe_topk": 2, "n_group": 1,
    "topk_group": 1, "sliding_window": 24, "attention_chunk_size": 32,
}  # fmt: skip
_MAX_KINDS = 4
_MAX_PARAMETERS = 300_000_000
# Original positions of a scaled rotary embedding: some documents are shorter, some longer.
_ORIGINAL = {"original_max_position_embeddings": 100}
# Of layers that begin or end a model and are of another kind than the rest.
_LEADING_LAYERS = ("first_k_dense_replace", "num_kv_shared_layers")


def require_equivalence(
    hf_config: Any,
    precision: Precision,
    log: Callable[[str], None],
    folder: Path | None = None,
    *,
    packed: bool = True,
) -> None:
    """Compares packed documents with single ones for an architecture without a written family, once per version.

    `packed=False`: documents that run one after the other, for every architecture: does the loss know its head?

    In float32, and on a GPU also in `precision`, which takes other implementations there. The result is kept in
    `folder` (`~/.cache/fireflyds`), by architecture, device, number formats and versions of the libraries.

    Raises:
        UserError: loss, gradients or independence of the documents differ, or the architecture cannot run packed.
    """
    if packed and hf_config.model_type in registry.names(FAMILIES):
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = torch.cuda.get_device_name() if device.type == "cuda" else "the CPU"
    formats = [Precision.fp32] + [precision] * (device.type == "cuda" and precision is not Precision.fp32)
    try:
        small = small_config(hf_config)
    except Exception as error:
        raise _not_supported(hf_config.model_type, error) from error
    versions = {name: version(name) for name in ("fireflyds", "torch", "transformers")}
    made_from = [small.to_dict(), where, [number_format.name for number_format in formats], versions, packed]
    digest = hashlib.sha256(json.dumps(made_from, sort_keys=True, default=str).encode()).hexdigest()
    file = (folder or _cache_folder()) / f"packing-{digest[:24]}.txt"
    if file.is_file():
        return
    reports = []
    for number_format in formats:
        name, results = _compare(small, device, DTYPES[number_format], packed=packed)
        summary = f"{name}, {number_format.name}, on {where}: {len(LENGTHS)} documents, packed and one by one"
        reports.append(f"{summary}\n{table(results)}")
        if not results or not all(result.proven for result in results):
            raise UserError(
                f"packed documents do not train as single ones:\n{reports[-1]}",
                key="model",
                value=hf_config.model_type,
                remedy="Give packing=false, which runs every document by itself, and report the table",
            )
    report = "\n".join(reports)
    how = "it was derived from the modules" if packed else "every document runs by itself (packing=false)"
    log(f"no family is written for {hf_config.model_type}: {how}. {report}")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(file, report + "\n")
    except OSError as error:
        log(f"note: the comparison is made again at the next start: {error}")


def small_config(hf_config: Any) -> Any:
    """The architecture with one layer of each kind, at least two, narrow; heads keep their size, windows are short."""
    if is_wrapper(hf_config):
        small = copy.deepcopy(hf_config)
        small.text_config = small_config(hf_config.get_text_config())
        small.text_config.pad_token_id = 0  # Gemma 4 puts it in the place of images
        return small
    small, num_layers, differ = copy.deepcopy(hf_config), hf_config.num_hidden_layers, layer_configs(hf_config)
    lists = {name: value for name, value in vars(hf_config).items() if _is_by_layer(value, num_layers)}
    kept = _layers_of_each_kind(_kinds(lists.values()), num_layers)
    for name, value in lists.items():
        setattr(small, name, [value[index] for index in kept])
    small.num_hidden_layers = len(kept)
    if len(differ) > 1:
        small.allow_global_per_layer_attribute_access = True
        names, heads = hf_config.per_layer_attributes, hf_config.num_attention_heads
        of_layers = [{name: getattr(differ[index], name) for name in names} for index in kept]
        small.per_layer_config = dict(enumerate(_with_four_heads(layer, heads) for layer in of_layers))
    rope = getattr(hf_config, "rope_parameters", None)
    if isinstance(rope, dict) and _ORIGINAL.keys() <= rope.keys():
        small.rope_parameters = rope | _ORIGINAL
    limits = _SMALL | _ORIGINAL | _fewer_heads(hf_config) | dict.fromkeys(_LEADING_LAYERS, 1)
    for name, value in limits.items():
        current = getattr(small, name, None)
        if isinstance(current, int) and current > value:
            setattr(small, name, value)
        elif isinstance(current, list):  # one of each layer
            setattr(small, name, [min(of_layer, value) for of_layer in current])
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(small, name, None)
    return small


def _with_four_heads(settings: dict[str, Any], heads: int) -> dict[str, Any]:
    """The settings of one layer with as many key heads for each of four query heads as before."""
    keys = settings.get("num_key_value_heads")
    return settings | ({} if keys is None else {"num_key_value_heads": max(1, 4 * keys // heads)})


def _is_by_layer(value: Any, num_layers: int) -> bool:
    return isinstance(value, list | tuple) and len(value) == num_layers


def _kinds(lists: Iterable[Any]) -> list[str]:
    """A name of the kind of every layer; kinds are what has few values (indices of layers are none)."""
    by_layer = [values for values in lists if len({str(value) for value in values}) <= _MAX_KINDS]
    return [str(kind) for kind in zip(*by_layer, strict=True)]


def _layers_of_each_kind(kinds: list[str], num_layers: int) -> list[int]:
    """The first layer of each kind, in order; the first and the last where all are alike."""
    first = sorted({kind: index for index, kind in reversed(list(enumerate(kinds)))}.values())
    return first if len(first) > 1 else sorted({0, num_layers - 1})


def _fewer_heads(hf_config: Any) -> dict[str, int]:
    """Four query heads, with as many key heads for each as before, and a hidden size of four heads."""
    heads = getattr(hf_config, "num_attention_heads", None)
    if heads is None:  # pure state-space models
        return {}
    limits = {"num_attention_heads": 4, "hidden_size": 4 * head_dim(hf_config)}
    key_heads = getattr(layer_configs(hf_config)[0], "num_key_value_heads", None)
    return limits | ({} if key_heads is None else {"num_key_value_heads": max(1, 4 * key_heads // heads)})


def _compare(
    small: Any, device: torch.device, dtype: torch.dtype, *, packed: bool
) -> tuple[str, list[ImplementationResult]]:
    """The class of a small model with random weights, and its results.

    Raises:
        UserError: the architecture cannot be built or run packed.
    """
    positions = getattr(small.get_text_config(), "max_position_embeddings", None) or max(LENGTHS)
    lengths = [min(length, positions) for length in LENGTHS]
    try:
        size = sum(parameter.numel() for parameter in bare_model(small).parameters())
        if size > _MAX_PARAMETERS:
            raise ValueError(f"its smallest model has {size:,} parameters, too many to try")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = build(small, attn_implementation="eager", dtype=dtype).eval()
            for parameter in model.parameters():
                # Biases start at zero and norms at one: every part must count.
                parameter.data.add_(torch.randn_like(parameter), alpha=0.05)
        return type(model).__name__, list(compare_implementations(model.to(device), lengths, seed=0, packed=packed))
    except UserError:
        raise
    except Exception as error:
        raise _not_supported(small.model_type, error) from error


def _not_supported(model_type: str, error: Exception) -> UserError:
    return UserError(
        f"its architecture does not run on packed documents ({describe(error)})",
        key="model",
        value=model_type,
        remedy="Give packing=false, which runs every document by itself, or a model of another architecture",
    )


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fireflyds"
