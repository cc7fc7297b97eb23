"""What the header says of the engine, and of what is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from support.lab import SMALL_STEP, make_lab

from minidistill.config import LoadedConfig
from minidistill.driver.header import header
from minidistill.placement.machine import GIB, Machine
from minidistill.placement.planner import plan_run
from minidistill.reporting.run_directory import RunDirectory

CPU = Machine(gpus=0, bytes=16 * GIB, vllm=False, bf16=False)


def test_the_engine_and_why_it_is_another_one(
    configure: Callable[..., LoadedConfig], tmp_path: Path
) -> None:
    loaded = configure(*SMALL_STEP, "--no-trainer.model.lora")
    lab, plan = make_lab(loaded), plan_run(loaded, CPU)

    def rows(reason: str) -> dict[str, str]:
        student = replace(plan.placement.student, reason=reason)
        placement = replace(plan.placement, student=student)
        directory = RunDirectory(tmp_path)
        parts = (plan, placement, lab.policy, lab.engine, lab.builder, directory)
        return dict(header(*parts, first_step=1).rows)

    assert rows("")["engine"].endswith("sharing the trainer's weights")
    assert rows("vLLM cannot")["engine"] == f"{rows('')['engine']}: vLLM cannot"
    assert rows("")["trained"] == "every weight"
    plan = replace(plan, shape=replace(plan.shape, text=plan.shape.parameters - 1))
    assert rows("")["trained"].startswith("every weight of the language model, 0.")
