"""A plan as `launch/plan.py` makes it, of an architecture without weights or data."""

from fireflyds.config import PlanConfig
from fireflyds.metrics.flops import step_flops
from fireflyds.models import load, tuning
from fireflyds.planner import plan
from fireflyds.planner.model_shape import model_shape
from fireflyds.planner.plan import TrainingPlan


def plan_of(config: PlanConfig) -> TrainingPlan:
    hf_config = load.architecture_of(config.model)
    family, rows = load.family_of(hf_config), load.base_vocab_size(config.model, hf_config)
    model = tuning.apply_tuning(load.bare_model(hf_config), family, config.tuning, rows, 0)
    precision = plan.cluster_precision(config)
    return plan.make_plan(
        config, model_shape(model, config), step_flops(model), precision, plan.summarize_data(config, None)
    )
