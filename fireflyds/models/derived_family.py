"""The family of a model type without a file in `families/`, derived from the modules of its model."""

import functools
import importlib
import inspect
from types import CodeType, FunctionType
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fireflyds import registry
from fireflyds.models.architecture import LINEAR, READ_DIRECTLY
from fireflyds.types import Family

FAMILIES = "fireflyds.models.families"
# Read by name only: the packed attention replaces the function behind it.
_REPLACED = {"eager_attention_forward"}


def derive_family(model: Any) -> Family:
    """Returns the family of a model, which may be on the meta device.

    Linear layers are those of the decoder, but for the last of Mamba's mixers, whose kernel takes its weight and would
    pass over an adapter, and those whose weights the model reads itself. They are given by the last part of their names
    where that names no other module, else in full. Classes whose forward pass is, to the instruction, that of a class
    of a written family take the same fused function.
    """
    decoder, head = model.get_decoder(), model.get_output_embeddings()
    prefix = next((f"{name}." for name, module in model.named_modules() if module is decoder and name), "")
    bypassed = {f"{name}.out_proj" for name, module in decoder.named_modules() if _takes_weight_of_out_proj(module)}
    linear = [
        prefix + name
        for name, module in decoder.named_modules()
        if type(module) in LINEAR and module is not head and name not in bypassed and not name.endswith(READ_DIRECTLY)
    ]
    leaves = sorted({name.rsplit(".", 1)[-1] for name in linear})
    named_alike = [name for name, _ in model.named_modules() if name.rsplit(".", 1)[-1] in leaves]
    names = leaves if sorted(named_alike) == sorted(linear) else linear
    classes = {type(module) for module in decoder.modules()}
    fused = {cls.__name__: function for cls in classes if (function := _fused_function(cls)) is not None}
    transposed = any(isinstance(module, Conv1D) for module in decoder.modules())
    return Family(model.config.model_type, tuple(names), _without_unfused_norms(fused, decoder), transposed)


def _takes_weight_of_out_proj(module: nn.Module) -> bool:
    """True for a mixer whose kernel takes its last weight (`outproj_weight`) without calling that layer."""
    constants = inspect.unwrap(type(module).forward).__code__.co_consts
    return any(isinstance(names, tuple) and "outproj_weight" in names for names in constants)


def _without_unfused_norms(fused: dict[str, str], decoder: nn.Module) -> dict[str, str]:
    """Drops fused layers whose second norm is not fused: they hand it the residual."""
    unfused = {
        type(module).__name__
        for module in decoder.modules()
        if fused.get(type(module).__name__) == "pre_norm_layer"
        and fused.get(type(module.post_attention_layernorm).__name__) != "norm"
    }
    return {name: function for name, function in fused.items() if name not in unfused}


def _fused_function(cls: type[nn.Module]) -> str | None:
    """The fused function of a written family whose class has the same forward pass, or None."""
    forward = inspect.unwrap(cls.forward)
    return next((function for written, function in _written_forwards() if _same(written, forward)), None)


@functools.cache
def _written_forwards() -> tuple[tuple[FunctionType, str], ...]:
    """The forward passes that the families' files replace, with the functions that replace them."""
    found = []
    for name in registry.names(FAMILIES):
        family: Family = registry.load(FAMILIES, name).FAMILY
        module = _modeling(family.model_type)
        found += [(inspect.unwrap(getattr(module, cls).forward), function) for cls, function in family.fused.items()]
    return tuple(found)


def _modeling(model_type: str) -> Any:
    return importlib.import_module(f"transformers.models.{model_type}.modeling_{model_type}")


def _same(first: FunctionType, second: FunctionType) -> bool:
    """True where two functions have equal instructions, names and constants, and so have those that they call."""
    if not _same_code(first.__code__, second.__code__):
        return False
    for name in set(first.__code__.co_names) - _REPLACED:
        ours, theirs = first.__globals__.get(name), second.__globals__.get(name)
        if isinstance(ours, FunctionType) and isinstance(theirs, FunctionType):
            if ours is not theirs and not _same(inspect.unwrap(ours), inspect.unwrap(theirs)):
                return False
        elif (ours is None) != (theirs is None):
            return False
    return True


def _same_code(first: CodeType, second: CodeType) -> bool:
    """As `_same`, of the code alone; docstrings do not count."""

    def constants(code: CodeType) -> list[Any]:
        has_docstring = bool(code.co_consts) and isinstance(code.co_consts[0], str)
        return [value for value in code.co_consts[has_docstring:] if not isinstance(value, CodeType)]

    def nested(code: CodeType) -> list[CodeType]:
        return [value for value in code.co_consts if isinstance(value, CodeType)]

    return (
        first.co_code == second.co_code
        and first.co_names == second.co_names
        and first.co_varnames[: first.co_argcount] == second.co_varnames[: second.co_argcount]
        and constants(first) == constants(second)
        and len(nested(first)) == len(nested(second))
        and all(map(_same_code, nested(first), nested(second)))
    )
