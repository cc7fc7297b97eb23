"""What would run where, whether it fits, and what to change if not."""

from minidistill.plan.planning import Device, Plan, plan
from minidistill.plan.shape import find_model_config

__all__ = ["Device", "Plan", "find_model_config", "plan"]
