"""Typed configuration: every option with its default and its documentation. Hydra composes it from `conf/`; defaults
are set nowhere else.

The docstring under a field is its entry in the option reference (`conf/README.md`) and in `-h`.
"""

from fireflyds.config.chat import ChatConfig
from fireflyds.config.cluster import ClusterConfig
from fireflyds.config.convert import ConvertConfig
from fireflyds.config.data import CleanConfig, DataConfig, PhaseConfig, PrepareConfig, SourceConfig
from fireflyds.config.doctor import DoctorConfig
from fireflyds.config.enums import (
    Container,
    Direction,
    Duplicates,
    ExportWhat,
    HeadInit,
    LossOn,
    ModelInit,
    ObjectiveAt,
    Offload,
    PieceAlgorithm,
    PlanFormat,
    Precision,
    Preference,
    PreTokenizer,
    PromptStyle,
    Pruner,
    ReportMode,
    Role,
    RowInit,
    Sampler,
    Schedule,
    Scheduler,
    StatsMode,
    SubmitAction,
    TextSplit,
    TokenizerKind,
    TrackerKind,
    TrainableRows,
    TuningMethod,
    UnicodeForm,
    VocabSizeRule,
    WandbMode,
    require_at_least,
)
from fireflyds.config.evaluate import BitsPerByteConfig, CmmluConfig, EvaluateConfig, MultipleChoiceConfig
from fireflyds.config.export import ExportConfig
from fireflyds.config.hardware import HardwareConfig, ZeroConfig
from fireflyds.config.optim import GroupConfig, OptimConfig
from fireflyds.config.pipeline import DemoConfig, PipelineConfig, StageConfig
from fireflyds.config.profile import ProfileConfig
from fireflyds.config.submit import SubmitConfig
from fireflyds.config.sweep import RangeConfig, SearchConfig, SweepConfig
from fireflyds.config.synthesize import SynthesizeConfig
from fireflyds.config.training import (
    CheckpointConfig,
    ModelConfig,
    ObjectiveConfig,
    PlanConfig,
    RecoveryConfig,
    TrackingConfig,
    TrainConfig,
)
from fireflyds.config.tuning import TuningConfig
from fireflyds.config.validation import ValidationConfig
from fireflyds.config.verbs import VERBS, Resources, Verb
from fireflyds.config.vocabulary import ExpandConfig, LearnConfig

__all__ = [
    "VERBS",
    "BitsPerByteConfig",
    "ChatConfig",
    "CheckpointConfig",
    "CleanConfig",
    "ClusterConfig",
    "CmmluConfig",
    "Container",
    "ConvertConfig",
    "DataConfig",
    "DemoConfig",
    "Direction",
    "DoctorConfig",
    "Duplicates",
    "EvaluateConfig",
    "ExpandConfig",
    "ExportConfig",
    "ExportWhat",
    "GroupConfig",
    "HardwareConfig",
    "HeadInit",
    "LearnConfig",
    "LossOn",
    "ModelConfig",
    "ModelInit",
    "MultipleChoiceConfig",
    "ObjectiveAt",
    "ObjectiveConfig",
    "Offload",
    "OptimConfig",
    "PhaseConfig",
    "PieceAlgorithm",
    "PipelineConfig",
    "PlanConfig",
    "PlanFormat",
    "PreTokenizer",
    "Precision",
    "Preference",
    "PrepareConfig",
    "ProfileConfig",
    "PromptStyle",
    "Pruner",
    "RangeConfig",
    "RecoveryConfig",
    "ReportMode",
    "Resources",
    "Role",
    "RowInit",
    "Sampler",
    "Schedule",
    "Scheduler",
    "SearchConfig",
    "SourceConfig",
    "StageConfig",
    "StatsMode",
    "SubmitAction",
    "SubmitConfig",
    "SweepConfig",
    "SynthesizeConfig",
    "TextSplit",
    "TokenizerKind",
    "TrackerKind",
    "TrackingConfig",
    "TrainConfig",
    "TrainableRows",
    "TuningConfig",
    "TuningMethod",
    "UnicodeForm",
    "ValidationConfig",
    "Verb",
    "VocabSizeRule",
    "WandbMode",
    "ZeroConfig",
    "require_at_least",
]
