"""Where the teacher is scored, and by which estimator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from minidistill.errors import UserError
from minidistill.placement.teacher import place_teacher

SEPARATE, OTHER_MODEL = "--no-teacher_inference.share", ("--teacher_inference.model.name", "other")
FULL_WEIGHTS = "--no-trainer.model.lora"


def estimator(name: str) -> tuple[str, str]:
    return "--trainer.loss.estimator", name


@pytest.mark.parametrize(
    ("flags", "scorer", "chosen", "separate", "reason"),
    [
        ((), "trainer", "full", False, "exact"),
        ((SEPARATE,), "engine", "sampled", True, "own"),
        (OTHER_MODEL, "engine", "sampled", True, "own"),
        (("--teacher_gpu_ids", "1"), "engine", "sampled", True, "own"),
        ((SEPARATE, *estimator("full")), "trainer", "full", False, "logits"),
        (estimator("sampled"), "engine", "sampled", False, "shares"),
        ((*estimator("sampled"), FULL_WEIGHTS), "engine", "sampled", True, "own"),
        (
            (*estimator("sampled"), FULL_WEIGHTS, "--orchestrator.teacher_model.update", "live"),
            "engine", "sampled", False, "shares",
        ),
        (
            (*estimator("sampled"), FULL_WEIGHTS, "--orchestrator.teacher_model.update", "ema"),
            "trainer", "sampled", False, "average",
        ),
        (
            (*estimator("sampled"), "--orchestrator.sampling.temperature", "0.7"),
            "trainer", "sampled", False, "temperature",
        ),
    ],
)  # fmt: skip
def test_with_vllm(
    configure: Callable[..., Any],
    flags: tuple[str, ...],
    scorer: str,
    chosen: str,
    separate: bool,
    reason: str,
) -> None:
    placed = place_teacher(configure(*flags).config, separate_engine=True, scores_ids=False)
    assert (placed.scorer, placed.estimator.name) == (scorer, chosen)
    assert placed.needs_own_engine == separate
    assert reason in placed.reason


def test_top_k_needs_an_engine_that_scores_any_ids(configure: Callable[..., Any]) -> None:
    config = configure(*estimator("top_k")).config
    assert place_teacher(config, separate_engine=True, scores_ids=True).scorer == "engine"
    placed = place_teacher(config, separate_engine=True, scores_ids=False)
    assert (placed.scorer, placed.estimator.name) == ("trainer", "top_k")
    assert "V2" in placed.reason


@pytest.mark.parametrize("name", ["auto", "full", "sampled", "top_k"])
def test_with_the_embedded_engine_the_trainer_scores(
    configure: Callable[..., Any], name: str
) -> None:
    placed = place_teacher(
        configure(*estimator(name)).config, separate_engine=False, scores_ids=False
    )
    assert placed.scorer == "trainer"
    assert placed.estimator.name == ("full" if name == "auto" else name)


def test_a_teacher_of_another_model_does_not_follow_the_student(
    configure: Callable[..., Any],
) -> None:
    with pytest.raises(UserError, match="another model"):
        configure(*OTHER_MODEL, "--orchestrator.teacher_model.update", "live")
