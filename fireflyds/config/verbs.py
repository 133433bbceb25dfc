"""One record per verb (a script of `launch/`): its configuration, inputs and resources."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

from fireflyds.config.chat import ChatConfig
from fireflyds.config.convert import ConvertConfig
from fireflyds.config.data import PrepareConfig
from fireflyds.config.doctor import DoctorConfig
from fireflyds.config.evaluate import EvaluateConfig
from fireflyds.config.export import ExportConfig
from fireflyds.config.pipeline import DemoConfig
from fireflyds.config.submit import SubmitConfig
from fireflyds.config.sweep import SweepConfig
from fireflyds.config.synthesize import SynthesizeConfig
from fireflyds.config.training import PlanConfig, TrainConfig
from fireflyds.config.vocabulary import ExpandConfig, LearnConfig


class Resources(Enum):
    """Resources that a job of the verb allocates."""

    cpu = 0
    one_gpu = 1
    all_gpus = 2
    """One rank per GPU on every node."""
    cpu_nodes = 3
    """One process per node."""


@dataclass(frozen=True, slots=True)
class PathOption:
    """`<group>=<path>` is short for `<group>=<option>` with `override`, where `{}` is replaced by the path."""

    option: str
    override: str


@dataclass(frozen=True, slots=True)
class Verb:
    """A script of `launch/`."""

    config: type
    inputs: tuple[str, ...] = ()
    """Keys whose values are files or folders that must exist when the verb starts."""
    models: tuple[str, ...] = ()
    """Keys that take the name of a model on a hub too, in the place of its folder."""
    needs_weights: bool = True
    """False for a verb that reads the configuration of a model alone."""
    resources: Resources = Resources.cpu
    submittable: bool = True
    """False for a verb that starts jobs itself, finishes immediately or is interactive."""
    path_options: Mapping[str, PathOption] = field(default_factory=dict)
    """Path options by configuration group."""


_MODEL_AND_STORE = {
    "model": PathOption("at_path", "model.path={}"),
    "data": PathOption("at_path", "data.store={}"),
}
_SOURCES = {"data": PathOption("at_path", "data.sources=[{{path:{}}}]")}
_MODEL_KEYS = ("model.path", "model.tokenizer")
_TRAIN_INPUTS = ("model.path", "model.tokenizer", "data.store", "validation.store", "zero.json")
_EVALUATE_INPUTS = ("model", "bits_per_byte.texts", "multiple_choice.questions", "cmmlu.data")

VERBS: dict[str, Verb] = {
    "synthesize": Verb(SynthesizeConfig, inputs=("corpus",)),
    "learn": Verb(LearnConfig, inputs=("corpus",)),
    "convert": Verb(ConvertConfig, inputs=("model",), models=("model",)),
    "expand": Verb(
        ExpandConfig, inputs=("base", "corpus", "pieces", "texts", "other", "donor"), models=("base", "other", "donor")
    ),
    "prepare": Verb(
        PrepareConfig,
        inputs=("tokenizer", "data.sources"),
        models=("tokenizer",),
        resources=Resources.cpu_nodes,
        path_options=_SOURCES,
    ),
    "plan": Verb(PlanConfig, models=_MODEL_KEYS, needs_weights=False, submittable=False, path_options=_MODEL_AND_STORE),
    "train": Verb(
        TrainConfig,
        inputs=_TRAIN_INPUTS,
        models=_MODEL_KEYS,
        resources=Resources.all_gpus,
        path_options=_MODEL_AND_STORE,
    ),
    "export": Verb(ExportConfig, resources=Resources.one_gpu),
    "evaluate": Verb(EvaluateConfig, inputs=_EVALUATE_INPUTS, models=("model",), resources=Resources.one_gpu),
    "chat": Verb(ChatConfig, inputs=("model",), models=("model",), submittable=False),
    "doctor": Verb(
        DoctorConfig,
        inputs=("model", "tokenizer", "data"),
        models=("model", "tokenizer"),
        resources=Resources.all_gpus,
    ),
    "submit": Verb(SubmitConfig, submittable=False),
    "sweep": Verb(SweepConfig, submittable=False),
    "demo": Verb(DemoConfig, submittable=False),
}
