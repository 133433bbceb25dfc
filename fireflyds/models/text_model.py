"""The class of a model that is trained: a causal language model, or one that wraps it together with towers for images
or sound, which are left out of it."""

import functools
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.auto import modeling_auto

from fireflyds.fs import read_json
from fireflyds.models import baichuan  # noqa: F401  (its classes are registered with transformers)
from fireflyds.tokenizer.rows import ties_embeddings

# Auto classes of transformers whose models wrap a text model.
_WRAPPERS = (modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING, modeling_auto.MODEL_FOR_MULTIMODAL_LM_MAPPING)


def is_wrapper(hf_config: Any) -> bool:
    """True for the configuration of a model that holds a text model beside others (`text_config`)."""
    return hf_config.get_text_config() is not hf_config


def plain_class(hf_config: Any) -> Any:
    """The class of transformers that loads the complete model, a wrapper with its towers; None where it has none."""
    if not is_wrapper(hf_config):
        return AutoModelForCausalLM if type(hf_config) in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING else None
    return next((mapping[type(hf_config)] for mapping in _WRAPPERS if type(hf_config) in mapping), None)


def trained_class(hf_config: Any) -> Any:
    """The class of the model that is trained: of a wrapper the same class, without its towers."""
    return _without_towers(plain_class(hf_config)) if is_wrapper(hf_config) else AutoModelForCausalLM


def tie_as_stored(hf_config: Any, folder: Path) -> None:
    """Sets in the configuration of a wrapper whether its head is its embeddings, as `config.json` or its weights say:
    transformers' defaults for the wrapper and for its text model may differ."""
    if not is_wrapper(hf_config) or not (any(folder.glob("*.safetensors")) or any(folder.glob("*.index.json"))):
        return
    tied = ties_embeddings(folder, read_json(folder / "config.json"))
    if tied is not None:
        hf_config.tie_word_embeddings = hf_config.get_text_config().tie_word_embeddings = tied


def build(hf_config: Any, **options: Any) -> Any:
    """Returns a model to train with random weights."""
    if not is_wrapper(hf_config):
        return AutoModelForCausalLM.from_config(hf_config, **options)
    from accelerate import init_empty_weights

    with init_empty_weights(include_buffers=False):  # towers may be larger than the text model
        model = trained_class(hf_config)._from_config(hf_config, **options)
    model.tie_weights()
    if torch.get_default_device().type != "meta":
        _draw_weights(model)
    return model


def _draw_weights(model: Any) -> None:
    """Gives parameters on the meta device the random values of the architecture's initialisation."""
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            setattr(module, name, nn.Parameter(torch.empty_like(parameter, device="cpu")))
        module._is_hf_initialized = False
    model.tie_weights()  # every parameter is a new one
    model.initialize_weights()


@functools.cache
def _without_towers(cls: Any) -> Any:
    """A class whose instances have the text model and the head alone, under the names of `cls`."""

    def init(self: Any, config: Any, *args: Any, **options: Any) -> None:
        cls.__init__(self, config, *args, **options)
        _remove_towers(self)

    # Transformers finds the renaming of weights by the name of the class.
    return type(cls.__name__, (cls,), {"__init__": init, "__module__": cls.__module__})


def _remove_towers(model: Any) -> None:
    kept = {id(model.get_decoder()), id(model.get_output_embeddings())}
    parents = [module for module in model.modules() if id(module) not in kept and _contains(module, kept)]
    removed = set()
    for parent in parents:
        own = [name for name, _ in parent.named_parameters(recurse=False)]
        towers = [name for name, child in parent.named_children() if not _contains(child, kept)]
        for name in own + towers:
            setattr(parent, name, None)
            removed.add(name)
    # Transformers lists the weights that it does not load.
    ignored = {rf"(^|\.){name}(\.|$)" for name in removed}
    model._keys_to_ignore_on_load_unexpected = ignored | set(model._keys_to_ignore_on_load_unexpected or ())


def _contains(module: nn.Module, ids: set[int]) -> bool:
    return any(id(part) in ids for part in module.modules())
