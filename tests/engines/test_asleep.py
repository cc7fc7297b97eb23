"""Engines on the trainer's GPUs sleep while the trainer works, and wake once memory is free."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.lab import SMALL_STEP, Lab, cpu_placement, make_lab
from support.paths import TESTS
from support.ranks import TWO_RANKS, ranked_lab
from support.recording_rank import record

from minidistill.engines import launch
from minidistill.engines.base import Engine, Finished, Ids
from minidistill.engines.student_teacher import StudentTeacherEngine
from minidistill.engines.vllm.engine import VllmEngine
from minidistill.engines.vllm.options import Options
from minidistill.evaluation import kl
from minidistill.trainer.distributed import launcher
from minidistill.trainer.token_budget import TokenBudget
from minidistill.types import Advance, Completion, Request, Role, SamplingParams

Configure = Callable[..., Any]
REQUEST, PARAMS = Request((2, 3, 4), 1), SamplingParams(2, 1.0)


class RecordingEngine(Engine):
    """Samples with another engine and records its calls."""

    name, location = "recording", "nowhere"

    def __init__(self, engine: Engine, events: list[str]) -> None:
        self.engine, self.events = engine, events

    def generate(
        self,
        requests: Sequence[Request],
        params: SamplingParams,
        role: Role,
        advance: Advance | None = None,
        finished: Finished | None = None,
    ) -> list[Completion]:
        self.events.append("generate")
        return self.engine.generate(requests, params, role, advance, finished)

    def score(
        self,
        prompts: Sequence[Ids],
        completions: Sequence[Ids],
        role: Role,
        temperature: float = 1.0,
    ) -> list[list[float]]:
        self.events.append("score")
        return self.engine.score(prompts, completions, role, temperature)

    def sync(self, version: int) -> None:
        self.events.append("sync")

    def sleep(self) -> None:
        self.events.append("sleep")


@pytest.fixture
def lab(configure: Configure) -> Lab:
    return make_lab(configure(*SMALL_STEP))


def test_engines_sleep_from_their_start_until_the_trainer_is_ready(
    configure: Configure, lab: Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    loaded = configure("--inference.engine", "vllm", "--no-teacher_inference.share")
    events: list[str] = []

    def start(*args: Any, teacher: bool) -> list[Engine]:
        events.append(f"start {'teacher' if teacher else 'student'}")
        return [RecordingEngine(lab.engine, events)]

    monkeypatch.setattr(launch, "import_module", lambda name: SimpleNamespace(start=start))
    launch.EngineLauncher(loaded.config, cpu_placement(loaded), tmp_path).start()
    starts = [event for event in events if event.startswith("start")]
    assert starts[0] == "start student"
    assert events == [*starts, *["sleep"] * len(starts)]


def test_the_engine_sleeps_while_the_trainer_computes_kls(
    configure: Configure, lab: Lab, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []

    def recorded(policy: Any, completions: Sequence[Ids], **options: Any) -> torch.Tensor:
        events.append("kl")
        return torch.zeros(sum(map(len, completions)))

    monkeypatch.setattr(kl, "token_kl", recorded)
    config, engine = configure(*SMALL_STEP).config, RecordingEngine(lab.engine, events)
    prompts, budget = [r.prompt for r in lab.rollouts], TokenBudget(4096)
    assert kl.teacher_kl(config, lab.policy, engine, prompts, budget).mean == 0
    assert events == ["generate", "sleep", "kl"]
    events.clear()
    assert kl.drift_kl(config, lab.policy, engine, lab.builder, budget) == 0
    assert events == ["sleep", "kl"], "the trainer's model samples the base's completions"


def test_the_students_engine_sleeps_while_the_trainers_model_is_the_teachers(lab: Lab) -> None:
    events: list[str] = []
    engine = StudentTeacherEngine(RecordingEngine(lab.engine, events), lab.engine)
    engine.generate([REQUEST], PARAMS, Role.STUDENT)
    engine.generate([REQUEST], PARAMS, Role.TEACHER)
    engine.score([(2, 3)], [(4,)], Role.TEACHER)
    assert events == ["generate", "sleep", "sleep"]


def test_every_rank_frees_its_cache_before_an_engine_wakes(
    configure: Configure, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "events"
    monkeypatch.setenv("RECORD", str(file))
    monkeypatch.setenv("PYTHONPATH", str(TESTS), prepend=":")
    monkeypatch.setattr(launcher, "MODULE", "support.recording_rank")

    def call(method: str, *args: Any, **kwargs: Any) -> tuple[list[Any], int]:
        record(method)
        return [], 0

    process: Any = SimpleNamespace(wait_until_started=lambda: None, call=call, close=lambda: None)
    monkeypatch.setattr("minidistill.engines.vllm.engine.EngineProcess", lambda *args: process)
    options = Options({"tensor_parallel_size": 1}, {}, {}, (), "0", sleeps=True)
    with ranked_lab(configure(*SMALL_STEP, *TWO_RANKS)) as lab:
        engine = VllmEngine(options, max_restarts=0)
        engine.attach(lab.policy, (Role.STUDENT,))
        engine.wait_until_ready()
        for _ in range(2):
            engine.sleep()
            engine.score([], [], Role.STUDENT)
        engine.close()
    once = ["sleep", "rank 1 frees its cache", "wake", "score"]
    assert file.read_text().splitlines() == once * 2
