"""Steps of one group: its prompt is computed once, and the teacher's context once a run."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support.lab import NO_MISMATCH_LIMIT, assert_same_gradients, make_lab
from support.paths import SOKOBAN
from support.runs import board, records
from support.tiny_runs import train

from bench.our_step import OurRun, open_run
from bench.workload import Case
from minidistill.config import load_config
from minidistill.errors import EXIT_OK
from minidistill.models.registry import resolve
from minidistill.trainer.forward import PrefixCache
from minidistill.types import Role

GROUP, SAMPLED = 4, 5
CASE = Case("tiny-sokoban", context=40, prompt=9, group=GROUP, batch=GROUP, completion=SAMPLED)
ONE_PROMPT = ("--orchestrator.batch_size", "4", "--orchestrator.rollouts_per_example", "4")


def tokens_of_a_step(run: OurRun) -> tuple[int, Any]:
    """The tokens that reach the model in a step, and the step's prompt."""
    passes: list[int] = []
    embedding = run.session.policy.student.get_input_embeddings()
    hook = embedding.register_forward_pre_hook(lambda _, args: passes.append(args[0].numel()))
    rollouts = run.step().rollouts
    hook.remove()
    (prompt,) = {(r.prompt.student_ids, r.prompt.teacher_ids): r.prompt for r in rollouts}.values()
    return sum(passes), prompt


@pytest.mark.parametrize("update", ["frozen", "live"])
def test_a_step_computes_no_more_than_the_prompts_own_tokens(update: str, tmp_path: Path) -> None:
    """Twice the student's prompt, to sample and to train, and the teacher's after the context."""
    with open_run(CASE, tmp_path) as run:
        context = max(run.session.prepared.contexts, key=len)
        assert len(context) > CASE.context
        completions = GROUP * (SAMPLED - 1)
        if update == "live":
            run.session.policy.teacher_weights = run.session.policy.weights_of(Role.STUDENT)
        for _ in range(2):
            tokens, prompt = tokens_of_a_step(run)
            assert prompt.teacher_ids[: len(context)] == context
            read = 0 if update == "live" else len(context)
            own = len(prompt.teacher_ids) - read
            assert tokens == 2 * len(prompt.student_ids) + own + 3 * completions


@pytest.mark.parametrize("flags", [(), ("--model.attn", "eager")], ids=["shared", "padded"])
def test_the_gradient_is_that_of_a_pass_on_all_tokens(flags: tuple[str, ...]) -> None:
    loaded = load_config([SOKOBAN, *ONE_PROMPT, *NO_MISMATCH_LIMIT, *flags])
    plain = make_lab(loaded, shares=False)
    cached = make_lab(loaded)
    cached.rollouts = plain.rollouts
    cached.trainer.prefixes.contexts = [plain.rollouts[0].prompt.teacher_ids[:65]]
    gradients, expected = cached.gradients(), plain.gradients()
    assert cached.trainer.prefixes.computed == 1
    assert_same_gradients(gradients, expected)


def test_which_beginning_is_cached() -> None:
    policy = make_lab(load_config([SOKOBAN, *ONE_PROMPT])).policy
    first, second = tuple(range(20)), (*range(15), *range(30, 40))
    cache = PrefixCache(policy, True, [first, first[:15], second, (0, 1)])
    teacher = Role.TEACHER
    assert cache.common([(*first, 7)], teacher) == first
    assert cache.common([(*second, 7), (*second, 7)], teacher) == second
    assert cache.common([(*first, 7), (*second, 7)], teacher) == first[:15]
    assert cache.common([first], teacher) == first[:15]  # a token is left to predict from
    assert cache.common([(0, 1, 2)], teacher) == ()
    assert cache.common([(0, 1, 2), (0, 1, 3)], teacher) == ()
    other = tuple(range(50, 60))
    assert cache.common([(*other, 1), (*other, 2)], teacher) == other  # found by comparing
    assert cache.common([], teacher) == ()
    assert cache.common([(*first, 7)], Role.STUDENT) == ()  # its weights change
    assert cache.common([(*first, 7), (*first, 8)], Role.STUDENT) == first
    assert PrefixCache(policy, False, [first]).common([(*first, 7)], teacher) == ()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path: Path) -> None:
    model = Path(resolve("tiny-sokoban"))
    flags = (*ONE_PROMPT, "--max_steps", "4", "--ckpt.interval", "2")
    for name in ("whole", "cut"):
        (tmp_path / name).mkdir()
        assert train(tmp_path / name, model, *flags) == EXIT_OK
    path, whole = tmp_path / "cut" / "run", tmp_path / "whole" / "run"
    (path / "scoreboard.json").unlink()
    for folder in ("checkpoints/step_000004", "adapter"):
        shutil.rmtree(path / folder)
    assert train(tmp_path / "cut", model, *flags, "--resume") == EXIT_OK
    assert [r["step"] for r in records(path)] == [1, 2, 3, 4]
    assert records(path) == records(whole)
    assert board(path) == board(whole)
