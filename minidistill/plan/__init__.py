"""What would run where, whether it fits, and what to change if not."""

from minidistill.plan.planning import Device, Plan, engine_share, plan
from minidistill.plan.shape import find_model_config

__all__ = ["Device", "Plan", "engine_share", "find_model_config", "plan"]
