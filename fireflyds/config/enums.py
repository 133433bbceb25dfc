"""Enumerations of option values, and the check of lower bounds."""

from enum import Enum
from typing import Any

from fireflyds.errors import UserError


class Precision(Enum):
    auto = 0
    fp32 = 1
    bf16 = 2
    fp16 = 3


class Schedule(Enum):
    cosine = 0
    linear = 1
    constant = 2
    constant_with_warmup = 3
    polynomial = 4
    wsd = 5


class ModelInit(Enum):
    pretrained = 0
    scratch = 1


class TuningMethod(Enum):
    full = 0
    freeze = 1
    lora = 2
    qlora = 3


class TrainableRows(Enum):
    frozen = 0
    new_rows = 1
    all = 2


class Offload(Enum):
    none = 0
    cpu = 1


class RowInit(Enum):
    mean = 0
    weighted = 1
    random = 2


class TokenizerKind(Enum):
    sentencepiece = 0
    byte_level = 1


class PieceAlgorithm(Enum):
    bpe = 0
    unigram = 1


class VocabSizeRule(Enum):
    fixed = 0
    knee = 1
    alp = 2


class ReportMode(Enum):
    full = 0
    only = 1


class ExportWhat(Enum):
    merged = 0
    adapter = 1


class PlanFormat(Enum):
    table = 0
    json = 1


class WandbMode(Enum):
    online = 0
    offline = 1
    disabled = 2


class TrackerKind(Enum):
    none = 0
    wandb = 1
    tensorboard = 2


class TextSplit(Enum):
    line = 0
    paragraph = 1
    file = 2


class LossOn(Enum):
    answers = 0
    last_answer = 1
    all = 2


class UnicodeForm(Enum):
    none = 0
    nfc = 1
    nfkc = 2


class Duplicates(Enum):
    keep = 0
    exact = 1
    near = 2


class StatsMode(Enum):
    full = 0
    only = 1


class Scheduler(Enum):
    none = 0
    slurm = 1


class Container(Enum):
    none = 0
    pyxis = 1
    apptainer = 2


class SubmitAction(Enum):
    submit = 0
    status = 1
    logs = 2
    cancel = 3


class Sampler(Enum):
    tpe = 0
    random = 1
    grid = 2


class Pruner(Enum):
    none = 0
    median = 1
    hyperband = 2


class Direction(Enum):
    min = 0
    max = 1


class ObjectiveAt(Enum):
    last = 0
    best = 1
    at_tokens = 2


class PromptStyle(Enum):
    auto = 0
    plain = 1
    chat = 2


def require_at_least(config: Any, section: str = "", /, **least: float) -> None:
    """Raises `UserError` for the first field of `config` below its lower bound; `section` is the prefix of its key."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise UserError(f"must be at least {bound:g}", key=f"{section}{name}", value=value)
