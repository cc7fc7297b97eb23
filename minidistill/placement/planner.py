"""The plan of a run: its placement, whether it fits, and what to change if not."""

from __future__ import annotations

from dataclasses import replace

from minidistill.config import Config, LoadedConfig
from minidistill.models.hub import load_model_config
from minidistill.placement.estimate import Plan, estimate
from minidistill.placement.layouts import faster_layouts
from minidistill.placement.machine import Machine
from minidistill.placement.model_shape import Shapes
from minidistill.placement.placement import Models, check_settings
from minidistill.placement.suggest import smallest_change


def plan(config: Config, models: Models, machine: Machine) -> Plan:
    """The plan of a configuration on a machine. If it does not fit, `change` names the settings
    with which it would. Raises UserError as `place` does."""
    shapes = Shapes.of(models)
    result = estimate(config, shapes, models, machine)
    if result.fits:
        return replace(result, faster=faster_layouts(result, shapes, models, machine))
    return replace(result, change=smallest_change(result, shapes, models, machine))


def plan_run(loaded: LoadedConfig, machine: Machine, *, shipped: bool = False) -> Plan:
    """The plan of a run as it is configured. Refuses what the run there would refuse.

    `shipped` allows model configurations that ship with the package, for planning without a hub.
    """
    result = plan(loaded.config, load_models(loaded.config, shipped=shipped), machine)
    check_settings(loaded, result.placement, machine)
    return result


def load_models(config: Config, *, shipped: bool = False) -> Models:
    """Load the configurations of the student's and the teacher's model."""
    student = load_model_config(config, shipped=shipped)
    name = config.separate_teacher
    return Models(student, load_model_config(config, name, shipped=shipped) if name else student)
