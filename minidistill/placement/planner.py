"""The plan of a run: its placement, whether it fits, and what to change if not."""

from __future__ import annotations

from dataclasses import replace

from minidistill.config import Config, LoadedConfig
from minidistill.errors import UserError
from minidistill.models.auto import matches
from minidistill.models.hub import load_model_config
from minidistill.placement.estimate import Plan, estimate
from minidistill.placement.layouts import faster_layouts
from minidistill.placement.limits import longest_sequence
from minidistill.placement.machine import Machine
from minidistill.placement.model_shape import Shapes
from minidistill.placement.placement import Models, check_settings
from minidistill.placement.suggest import smallest_change


def plan(config: Config, models: Models, machine: Machine) -> Plan:
    """The plan of a configuration on a machine. If it does not fit, `change` names the settings
    with which it would. Raises UserError as `place` does, and for settings that contradict the
    model."""
    shapes = Shapes.of(models)
    _check_model(config, shapes, models)
    result = estimate(config, shapes, models, machine)
    if result.fits:
        return replace(result, faster=faster_layouts(result, shapes, models, machine))
    return replace(result, change=smallest_change(result, shapes, models, machine))


def _check_model(config: Config, shapes: Shapes, models: Models) -> None:
    lora, max_tokens = config.trainer.model.lora, config.orchestrator.sampling.max_tokens
    targets = lora.target_modules if lora else "all-linear"
    named = [] if targets == "all-linear" else targets
    if any(matches(shapes.student.head_name, target) for target in named):
        raise UserError(
            "the LM head would get an adapter: the loss needs one head for student and teacher",
            where="trainer.model.lora.target_modules",
            fix="leave the output embedding out",
        )
    unknown = [name for name in named if not shapes.student.adapted([name])]
    if lora and lora.init:  # its tensors are compared by name when they are loaded
        unknown = []
    if unknown:  # peft would leave them out, or fail if it knows none
        names = sorted({linear.name.rpartition(".")[2] for linear in shapes.student.linears})
        raise UserError(
            f"trainer.model.lora.target_modules names {', '.join(unknown)}: "
            "the model has no such layer for an adapter",
            where="trainer.model.lora.target_modules",
            fix=f'use "all-linear", or some of {", ".join(names)}',
        )
    limit = min(longest_sequence(m, config.seq_len) for m in (models.student, models.teacher))
    if max_tokens >= limit:
        raise UserError(
            f"orchestrator.sampling.max_tokens = {max_tokens} leaves no room for a prompt: "
            f"the model takes {limit} tokens",
            where="orchestrator.sampling.max_tokens",
            fix=f"set it below {limit}, which includes context, prompt and completion",
        )


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
