"""Enumerations of option values, and the checks of lower bounds."""

import math
from enum import Enum
from typing import Any

from fireflyds.errors import UserError


class Precision(Enum):
    """Chooses the number format of training or of written weights."""

    auto = 0
    fp32 = 1
    bf16 = 2
    fp16 = 3


class Schedule(Enum):
    """Chooses the learning rate schedule."""

    cosine = 0
    linear = 1
    constant = 2
    constant_with_warmup = 3
    polynomial = 4
    wsd = 5


class ModelInit(Enum):
    """Chooses the initial weights: loaded from a directory, or random."""

    pretrained = 0
    scratch = 1


class TuningMethod(Enum):
    """Chooses the parameters that train: all, a matched subset, or adapters (on a quantised base with `qlora`)."""

    full = 0
    freeze = 1
    lora = 2
    qlora = 3


class TrainableRows(Enum):
    """Chooses the trainable rows of the embeddings or of the head."""

    frozen = 0
    new_rows = 1
    all = 2


class Offload(Enum):
    """Chooses the device that stores optimizer states or parameters; `none`: the GPU."""

    none = 0
    cpu = 1


class RowInit(Enum):
    """Chooses the initial values of new embedding rows."""

    mean = 0
    weighted = 1
    random = 2
    omp = 3


class PreTokenizer(Enum):
    """Chooses where a base in `tokenizer.json` cuts text into words."""

    base = 0
    marks = 1


class HeadInit(Enum):
    """Chooses the initial values of new rows of an output head that is not tied to the embeddings."""

    same = 0
    mean = 1
    first_piece = 2


class TokenizerKind(Enum):
    """Chooses the format of a learned tokenizer."""

    sentencepiece = 0
    byte_level = 1


class PieceAlgorithm(Enum):
    """Chooses the algorithm that learns pieces."""

    bpe = 0
    unigram = 1


class VocabSizeRule(Enum):
    """Chooses the rule for the number of new pieces."""

    fixed = 0
    knee = 1
    alp = 2


class ReportMode(Enum):
    """Chooses between an expansion with its report and the comparison of two tokenizers alone."""

    full = 0
    only = 1


class ExportWhat(Enum):
    """Chooses between the merged model and the adapters alone."""

    merged = 0
    adapter = 1


class PlanFormat(Enum):
    """Chooses the output format of `plan` and `doctor`."""

    table = 0
    json = 1


class WandbMode(Enum):
    """Chooses the mode of the W&B client."""

    online = 0
    offline = 1
    disabled = 2


class TrackerKind(Enum):
    """Chooses the tracker that receives the metrics, beside the files of the run."""

    none = 0
    wandb = 1
    tensorboard = 2


class TextSplit(Enum):
    """Chooses the unit of one document in a text file."""

    line = 0
    paragraph = 1
    file = 2


class LossOn(Enum):
    """Chooses the tokens of a dialogue that carry loss."""

    answers = 0
    last_answer = 1
    all = 2


class Role(Enum):
    """The roles of turns in a dialogue."""

    system = 0
    user = 1
    assistant = 2
    tool = 3


class Preference(Enum):
    """Chooses what is stored of preference pairs and of labelled answers."""

    chosen = 0
    pairs = 1


class UnicodeForm(Enum):
    """Chooses the Unicode normalisation form."""

    none = 0
    nfc = 1
    nfkc = 2


class Duplicates(Enum):
    """Chooses the duplicate documents that are dropped."""

    keep = 0
    exact = 1
    near = 2


class StatsMode(Enum):
    """Chooses between preparing a store and printing the statistics of an existing one."""

    full = 0
    only = 1


class Scheduler(Enum):
    """Chooses the scheduler that starts jobs; `none`: processes on this machine."""

    none = 0
    slurm = 1


class Container(Enum):
    """Chooses the container runtime of the ranks."""

    none = 0
    pyxis = 1
    apptainer = 2


class SubmitAction(Enum):
    """Chooses the action of `submit` on the jobs of a run."""

    submit = 0
    status = 1
    logs = 2
    cancel = 3


class Sampler(Enum):
    """Chooses the algorithm that proposes the values of a trial."""

    tpe = 0
    random = 1
    grid = 2


class Pruner(Enum):
    """Chooses the rule that stops trials early."""

    none = 0
    median = 1
    hyperband = 2


class Direction(Enum):
    """Chooses whether a study minimizes or maximizes its metric."""

    min = 0
    max = 1


class ObjectiveAt(Enum):
    """Chooses the point of a trial at which its metric is taken."""

    last = 0
    best = 1
    at_tokens = 2


class PromptStyle(Enum):
    """Chooses whether questions are formatted with the model's chat template."""

    auto = 0
    plain = 1
    chat = 2


def require_at_least(config: Any, section: str = "", /, **least: float) -> None:
    """Raises `UserError` for the first field of `config` below its lower bound; `section` is the prefix of its key."""
    for name, bound in least.items():
        value = getattr(config, name)
        if value is not None and value < bound:
            raise UserError(
                f"must be at least {bound:g}", key=f"{section}{name}", value=value, remedy=f"Give {bound:g} or more"
            )


def require_above(config: Any, section: str = "", /, *, finite: bool = True, **bounds: float) -> None:
    """Raises `UserError` for the first field of `config` not above its bound, or infinite where it must be `finite`;
    `section` as above."""
    for name, bound in bounds.items():
        value = getattr(config, name)
        if value is not None and (not value > bound or (finite and value == math.inf)):
            rule = f"must be greater than {bound:g}" + " and finite" * (value == math.inf)
            raise UserError(rule, key=f"{section}{name}", value=value, remedy=f"Give a number above {bound:g}")
