"""A plan as `launch/plan.py` makes it, of an architecture without weights or data."""

from fireflyds.config import PlanConfig
from fireflyds.engine.planning import plan
from fireflyds.engine.planning.flops import step_flops
from fireflyds.engine.planning.shape import shape_of
from fireflyds.models import load, tuning


def plan_of(config: PlanConfig) -> plan.Plan:
    hf_config = load.architecture_of(config.model)
    family, rows = load.family_of(hf_config.model_type), load.base_vocab_size(config.model, hf_config)
    model = tuning.apply(load.bare_model(hf_config), family, config.tuning, rows, 0)
    precision = plan.precision_of(config)
    return plan.make(config, shape_of(model, config), step_flops(model), precision, plan.data_of(config, None))
