"""The plan of a run on this machine."""

from __future__ import annotations

from typing import Any

import torch

from minidistill.config import Config
from minidistill.engines.vllm.options import wants_vllm
from minidistill.models.hub import load_model_config
from minidistill.placement.command import machine
from minidistill.placement.planner import Plan, plan


def plan_here(config: Config) -> tuple[Plan, tuple[Any, Any]]:
    """The plan and the configurations of the student's and the teacher's model that it was made
    from. The same in every process of a run on this machine."""
    gpus, size = machine(None, None)
    vllm = wants_vllm(config, torch.device("cuda" if gpus else "cpu"))
    own = load_model_config(config)
    other = config.separate_teacher
    models = own, load_model_config(config, other) if other else own
    return plan(config, own, gpus, size, teacher_config=models[1], vllm=vllm), models
