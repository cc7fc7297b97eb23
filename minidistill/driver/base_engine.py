"""The untrained model as an engine, for samples outside a run's steps."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from minidistill.config import Config
from minidistill.config.adapter import without_initial_adapter
from minidistill.engines.base import Engine
from minidistill.engines.embedded import EmbeddedEngine
from minidistill.placement.placement import Placement
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.loading import load_policy


def base_engine(
    config: Config, tokenizer: Any, placement: Placement, end_of_turn_ids: Iterable[int]
) -> Engine:
    """Load the model. It samples on the trainer's first device, up to one of these ids.

    Raises UserError if that fails.
    """
    # neither a copy of the weights nor another model for the teacher
    teacher = dataclasses.replace(placement.teacher, scorer="engine")
    policy = load_policy(
        without_initial_adapter(config),
        tokenizer,
        dataclasses.replace(placement, teacher=teacher),
        end_of_turn_ids=list(end_of_turn_ids),
    )
    return EmbeddedEngine(policy, PrefixCache(policy, shares=False))
