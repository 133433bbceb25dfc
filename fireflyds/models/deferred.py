"""Models whose weights are read one by one, when ZeRO-3 shards them: no process ever holds the whole model.

Parameters are on the meta device until then. What `parameter.read()` returns is a view of a memory-mapped file, whose
pages all processes of a host share.
"""

import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from fireflyds.errors import UserError
from fireflyds.models.file_names import FileNames
from fireflyds.models.text_model import build
from fireflyds.tokenizer.weight_files import weight_readers


def deferred_model(path: str, hf_config: Any, dtype: torch.dtype, quantization: Any = None) -> Any | None:
    """Returns the model of a directory with its weights still to be read; None where its files name or shape them in
    another way than the model does, so that transformers must convert them.

    `quantization`: a `BitsAndBytesConfig` of 4 bits; its linear layers are quantised when they are read.
    """
    from accelerate import init_empty_weights

    # transformers writes the quantisation into it, and refuses one that has it where it loads the model instead.
    hf_config = copy.deepcopy(hf_config)
    # Buffers, such as rotary frequencies, are computed: no file has them.
    with init_empty_weights(include_buffers=False):
        model = build(hf_config, dtype=dtype)
        if quantization is not None:
            _replace_linear_layers(model, quantization)
    model.tie_weights()
    try:
        files = {name: tensor for _, read in weight_readers(Path(path)) for name, tensor in read()}
    except UserError:
        return None
    names = FileNames(model)
    tensors = {names.read_into(name): tensor for name, tensor in files.items()}
    for name, parameter in model.named_parameters():
        tensor = tensors.get((name, False))
        if tensor is None or tensor.shape != parameter.shape:
            return None
        defer(parameter, partial(_as_is, tensor))
    if (Path(path) / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(path)
    return model.eval()


def _replace_linear_layers(model: Any, quantization: Any) -> None:
    from transformers.quantizers import AutoHfQuantizer

    quantizer = AutoHfQuantizer.from_config(quantization, pre_quantized=False)
    quantizer.preprocess_model(model=model, device_map={"": "cpu"})
    quantizer.postprocess_model(model)


def _as_is(tensor: Tensor) -> Tensor:
    return tensor


def defer(parameter: Tensor, read: Callable[[], Tensor]) -> None:
    """Sets what a parameter on the meta device will be: `read()`, in any number format, of its shape."""
    parameter.read = read  # type: ignore[attr-defined]


def reader_of(parameter: Tensor) -> Callable[[], Tensor]:
    """Returns what reads a parameter; its own values where they are there."""
    read: Callable[[], Tensor] = getattr(parameter, "read", None) or partial(_as_is, parameter.detach())
    return read


def rows_of(parameter: Tensor, rows: slice) -> nn.Parameter:
    """Returns a parameter of its own with some rows of another one, deferred where that one is."""
    if not parameter.is_meta:
        return nn.Parameter(parameter[rows].detach().clone(), requires_grad=False)
    part = nn.Parameter(parameter[rows].detach(), requires_grad=False)
    defer(part, partial(_rows, reader_of(parameter), rows))
    return part


def _rows(read: Callable[[], Tensor], rows: slice) -> Tensor:
    return read()[rows]


@torch.no_grad()
def copy_rows(parameter: Tensor, first: int, values: Tensor) -> None:
    """Copies `values` into the rows of a parameter from `first` on, or has them copied when it is read."""
    if parameter.is_meta:
        defer(parameter, partial(_with_rows, reader_of(parameter), first, values))
    elif parameter.dim():
        parameter[first : first + len(values)].copy_(values)
    else:
        parameter.copy_(values)


def _with_rows(read: Callable[[], Tensor], first: int, values: Tensor) -> Tensor:
    if not first and values.shape == (earlier := read()).shape:
        return values
    result = earlier.float() if earlier.dtype.itemsize < values.dtype.itemsize else earlier.clone()
    result[first : first + len(values)] = values
    return result


def materialize(parameter: Any, device: torch.device, dtype: torch.dtype | None, *, reads: bool) -> None:
    """Gives a deferred parameter its values, on `device`, in its own object; others are moved there.

    Args:
        dtype: the number format of floating-point values; None for that of the parameter.
        reads: False for a process that receives the values from another: its memory is left as it is. A quantised
            weight is read by every process, since its scales are no parameters.
    """
    if not parameter.is_meta:
        castable = parameter.is_floating_point() and dtype is not None and not _is_four_bit(parameter)
        parameter.data = parameter.data.to(device, dtype) if castable else parameter.data.to(device)
        return
    if _is_four_bit(parameter):
        settings = {key: value for key, value in parameter.__dict__.items() if key != "read"}
        value = parameter.read().to(dtype or parameter.dtype)
        new = type(parameter)(value, requires_grad=False, **settings).to(device)
    else:
        kind = dtype or parameter.dtype
        value = (
            parameter.read().detach().to(device, kind)
            if reads
            else torch.empty(parameter.shape, dtype=kind, device=device)
        )
        new = nn.Parameter(value, requires_grad=parameter.requires_grad)
    # The optimizer's groups and tied modules hold this object.
    torch.utils.swap_tensors(parameter, new)


def _is_four_bit(parameter: Any) -> bool:
    return type(parameter).__name__ == "Params4bit"
