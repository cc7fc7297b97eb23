"""Other layouts of a run's GPUs that the plan expects to be faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any

from minidistill.placement.estimate import Plan
from minidistill.placement.machine import Machine
from minidistill.placement.model_shape import Shapes
from minidistill.placement.placement import Models
from minidistill.placement.suggest import Search
from minidistill.placement.throughput import Layout

LEAST_GPUS = 4
"""With fewer there is little to choose."""
WORTHWHILE = 0.95
"""The most that a faster layout takes of the planned step's time: smaller gains are noise."""
SCHEDULES: Sequence[Mapping[str, Any]] = ({}, {"schedule": "async"})
TEACHERS: Sequence[Mapping[str, Any]] = (
    {},
    {"trainer.loss.estimator": "full"},
    {"trainer.loss.estimator": "sampled", "teacher_inference.share": True},
)


def faster_layouts(
    plan: Plan, shapes: Shapes, models: Models, machine: Machine
) -> tuple[Layout, ...]:
    """Layouts that fit and take less time, the fastest first: with the teacher in the trainer or in
    the student's engine, each under `sync` and `async`. Empty on less than 4 GPUs."""
    if plan.timing is None or machine.gpus < LEAST_GPUS or not plan.fits:
        return ()
    search = Search(shapes, models, machine)
    by_seconds: dict[float, Mapping[str, Any]] = {}
    for teacher, schedule in product(TEACHERS, SCHEDULES):
        settings = {**teacher, **schedule}
        other = search.plan(plan.config, settings)
        if other is None or not other.fits or other.timing is None:
            continue
        if other.timing.step < WORTHWHILE * plan.timing.step:
            by_seconds.setdefault(other.timing.step, settings)  # equal ones: the fewest settings
    return tuple(Layout(by_seconds[seconds], seconds) for seconds in sorted(by_seconds))
