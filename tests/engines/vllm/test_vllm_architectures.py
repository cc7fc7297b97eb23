"""Runs of tiny models with vLLM, checked in float64 by transformers and peft."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.tiny_models import TARGETS, VLLM_SIZES, build
from support.tiny_runs import train
from support.verification import largest_difference
from support.vllm import NEEDS_CPU_VLLM

from minidistill.errors import EXIT_OK

pytestmark = NEEDS_CPU_VLLM


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("gemma2", {"attn_logit_softcapping": 5.0}),
        pytest.param("granite", {}, marks=pytest.mark.slow),
        pytest.param("cohere", {}, marks=pytest.mark.slow),
        pytest.param("phi", {"num_key_value_heads": 2}, marks=pytest.mark.slow),
        pytest.param("falcon_h1", {}, marks=pytest.mark.slow),
    ],
)
def test_a_runs_figures_are_the_models(name: str, fields: dict[str, float], tmp_path: Path) -> None:
    """The sampler's log-probs must be the trainer's, or the run stops."""
    model = build(name, tmp_path, **{**VLLM_SIZES, **fields})
    targets = ("--trainer.model.lora.target_modules", TARGETS[name]) if name in TARGETS else ()
    assert train(tmp_path, model, "--inference.engine", "vllm", *targets) == EXIT_OK
    assert max(largest_difference(tmp_path / "run", model, step) for step in (1, 2)) <= 1e-5
