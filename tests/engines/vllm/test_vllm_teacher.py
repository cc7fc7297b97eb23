"""A teacher scored by an engine: the right weights, before and after the student has moved."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from support.vllm import NEEDS_CPU_VLLM, SOKOBAN, Bench, placement_of

from minidistill.config import load_config
from minidistill.engines.launch import EngineLauncher
from minidistill.envs.registry import load_environments
from minidistill.errors import UserError
from minidistill.models.hub import load_teacher_tokenizer, load_tokenizer
from minidistill.models.registry import resolve
from minidistill.reporting.terminal import open_display
from minidistill.rollouts.collector import Collector
from minidistill.rollouts.stream_collector import StreamCollector
from minidistill.tasks.prompts import PromptBuilder
from minidistill.trainer.forward import PrefixCache
from minidistill.trainer.loading import load_policy
from minidistill.trainer.trainer import Trainer
from minidistill.types import Role, Rollout

pytestmark = NEEDS_CPU_VLLM
SMALL = (
    "--inference.engine", "vllm", "--trainer.loss.estimator", "sampled",
    "--orchestrator.batch_size", "8", "--orchestrator.env.0.args.num_train_examples", "8",
    "--trainer.optim.lr", "1e-3",
)  # fmt: skip


@contextmanager
def made(*flags: str, shared: Bench | None = None) -> Iterator[tuple[Trainer, Collector, Any]]:
    """A run's trainer, collector and engine; the student's is the `shared` one if there is one."""
    config = load_config([SOKOBAN, *SMALL, *flags]).config
    tokenizer = load_tokenizer(config)
    launcher = EngineLauncher(config, placement_of(config), Path("sync"))
    try:
        if shared is None:
            placement = launcher.start()
        else:
            placement, launcher.student = launcher.placement, shared.engine
            assert placement.teacher_engine is None
        policy = load_policy(config, tokenizer, placement)
        prefixes = PrefixCache(policy, shares=True)
        trainer = Trainer(policy, config, placement, prefixes)
        teacher = config.orchestrator.teacher_model
        builder = PromptBuilder(tokenizer, teacher.context, teacher.context_placement)
        environments = load_environments(config.orchestrator.env, "")
        collector = Collector(config, environments, builder, placement, open_display())
        with pytest.MonkeyPatch.context() as patch:
            if shared is not None:  # it still has the weights of the test before
                patch.setattr(shared.engine, "verify", lambda *args: None)
            engine = launcher.attach(policy, prefixes)
        yield trainer, collector, engine
    finally:
        if shared is None:
            launcher.close()
        else:  # as it was
            lora = shared.policy.lora
            roles = (Role.STUDENT, Role.TEACHER) if lora else (Role.STUDENT,)
            shared.engine.attach(shared.policy, roles)


@torch.no_grad()
def truth(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> list[float]:
    logits = model(input_ids=torch.tensor([[*prompt, *completion]])).logits
    logp = logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return logp.gather(1, torch.tensor(completion)[:, None])[:, 0].tolist()


def base() -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(resolve("tiny-sokoban"), dtype=torch.float32)


def test_the_frozen_teacher_is_the_base_in_the_students_engine(adapter_bench: Bench) -> None:
    with made(shared=adapter_bench) as (trainer, collector, engine):
        assert engine is adapter_bench.engine
        check_the_frozen_teacher(trainer, collector, engine, adapter_bench.versions)


@pytest.mark.parametrize(
    "flags",
    [("--no-teacher_inference.share",), ("--no-trainer.model.lora",)],
    ids=["own engine", "every weight trained"],
)
def test_the_frozen_teacher_is_the_base_in_an_engine_of_its_own(flags: tuple[str, ...]) -> None:
    with made(*flags) as (trainer, collector, engine):
        assert len({e.process.popen.pid for e in (engine.student, engine.teacher)}) == 2
        check_the_frozen_teacher(trainer, collector, engine, count())


def check_the_frozen_teacher(
    trainer: Trainer, collector: Collector, engine: Any, versions: Iterator[int]
) -> None:
    """Its log-probs, and with an adapter the gradient from them: it does not depend on who scored
    the teacher."""
    model = base()
    for step in (1, 2, 3):
        version = next(versions)
        engine.sync(version)
        rollouts, metrics = collector.collect(engine, step, version)
        assert metrics["time/teacher"] > 0
        for rollout in rollouts:
            completion = rollout.completion.token_ids
            expected = truth(model, rollout.prompt.teacher_ids, completion)
            assert rollout.teacher is not None
            assert list(rollout.teacher.logprobs) == pytest.approx(expected, abs=1e-4)
            with trainer.policy.inference():
                own = truth(trainer.policy.model, rollout.prompt.student_ids, completion)
            assert rollout.completion.logprobs == pytest.approx(tuple(own), abs=1e-4)
        if trainer.policy.lora:
            assert_the_trainer_teaches_the_same(trainer, rollouts)
        metrics = trainer.step(rollouts, step, lambda count: None).metrics
        assert metrics["kl/sampler_mismatch"] < 1e-8
        assert "entropy/teacher" not in metrics


def place(rollout: Rollout) -> tuple[str, int]:
    """Which rollout of a step it is."""
    return rollout.prompt.task.id, rollout.sample


@pytest.mark.parametrize("teacher", ["base", "live"])
def test_the_engine_scores_completions_while_it_samples_others(
    adapter_bench: Bench, teacher: str
) -> None:
    """The rollouts of a plain step, each scored once, without a call for the scores."""
    flags = ("--orchestrator.teacher_model.update", "live") if teacher == "live" else ()
    with made(*flags, shared=adapter_bench) as (_, collector, engine):
        version = next(adapter_bench.versions)
        engine.sync(version)
        expected, metrics = collector.collect(engine, 1, version)
        assert metrics["perf/teacher_repeat_frac"] == 0
        streaming = StreamCollector(collector, engine, least_tokens=100)
        try:
            stream = streaming.start(1, version)
            parts = list(stream.rollouts.parts)
        finally:
            streaming.close()
        assert len(parts) > 1
        trained = {"time/train": 1.0, "perf/train_tokens_per_second": 1.0}
        found = stream.metrics(trained)
        assert found["perf/teacher_repeat_frac"] == 0
        assert "time/teacher" not in found
        rollouts = [rollout for part in parts for rollout in part]  # as their groups ended
        pairs = zip(sorted(rollouts, key=place), sorted(expected, key=place), strict=True)
        for ours, theirs in pairs:
            assert ours.completion.token_ids == theirs.completion.token_ids
            assert (ours.reward, ours.advantage) == (theirs.reward, theirs.advantage)
            assert ours.teacher is not None
            assert theirs.teacher is not None
            expected_logps = pytest.approx(list(theirs.teacher.logprobs), abs=1e-4)
            assert list(ours.teacher.logprobs) == expected_logps


@pytest.mark.parametrize("weights", ["adapter_bench", "weights_bench"])
def test_a_live_teacher_is_the_student_of_now(weights: str, request: pytest.FixtureRequest) -> None:
    shared = request.getfixturevalue(weights)
    flags = ("--no-trainer.model.lora",) if weights == "weights_bench" else ()
    live = ("--orchestrator.teacher_model.update", "live", *flags)
    with made(*live, shared=shared) as (trainer, collector, engine):
        for step in (1, 2):
            version = next(shared.versions)
            engine.sync(version)
            rollouts, _ = collector.collect(engine, step, version)
            for r in rollouts:
                model, completion = trainer.policy.model, r.completion.token_ids
                expected = truth(model, r.prompt.teacher_ids, completion)
                assert r.teacher is not None
                assert list(r.teacher.logprobs) == pytest.approx(expected, abs=1e-4)
            trainer.step(rollouts, step, lambda count: None)


def assert_the_trainer_teaches_the_same(trainer: Trainer, rollouts: list[Any]) -> None:
    found = []
    for batch in (rollouts, [replace(r, teacher=None) for r in rollouts]):
        output = trainer._objective(batch, ((), None))
        (output.loss.sum() / output.loss.numel()).backward()
        found.append({n: p.grad.clone() for n, p in trainer.policy.parameters})
        trainer.optimizer.zero_grad()
    for name, gradient in found[0].items():
        torch.testing.assert_close(gradient, found[1][name], rtol=1e-3, atol=1e-6)


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model with the same tokenizer: the shipped one, shaken."""
    from transformers import AutoTokenizer

    folder, model = tmp_path_factory.mktemp("other"), base()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + 0.05 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(resolve("tiny-sokoban")).save_pretrained(folder)
    return folder


def test_a_teacher_of_another_model_has_its_own_engine(other: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    with made("--teacher_inference.model.name", str(other)) as (trainer, collector, engine):
        assert engine.student.process.popen.pid != engine.teacher.process.popen.pid
        engine.sync(0)
        rollouts, _ = collector.collect(engine, 1, 0)
        for r in rollouts:
            expected = truth(model, r.prompt.teacher_ids, r.completion.token_ids)
            assert list(r.teacher.logprobs) == pytest.approx(expected, abs=1e-4)
        trainer.step(rollouts, 1, lambda count: None)


def test_a_teacher_with_another_vocabulary_is_refused(other: Path) -> None:
    config = load_config([SOKOBAN, "--teacher_inference.model.name", str(other)]).config
    tokenizer = load_tokenizer(config)
    load_teacher_tokenizer(config, tokenizer)
    tokenizer.add_tokens(["<another>"])
    with pytest.raises(UserError, match="have different vocabularies"):
        load_teacher_tokenizer(config, tokenizer)
