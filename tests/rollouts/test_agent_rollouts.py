"""Programs with the engine: what is trained on is what was sampled for their requests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.agents import SECRET, agent, questions
from support.conversations import Stage

from minidistill.envs.isolated import close_environments
from minidistill.errors import EXIT_HEALTH, UserError
from minidistill.rollouts.async_collector import AsyncCollector
from minidistill.types import Role

Configure = Callable[..., Any]


def sampled(stage: Any) -> Counter[Any]:
    """What the engine has sampled: prompt, tokens and log-probs."""
    return Counter(
        (request.prompt_ids, completion.token_ids, completion.logprobs)
        for requests, completions, _ in stage.engine.calls
        for request, completion in zip(requests, completions, strict=True)
    )


def trained(rollouts: Any) -> Counter[Any]:
    """The same, of the samples that are trained on, from the docstrings of `Completion`."""
    turns: Counter[Any] = Counter()
    for rollout in rollouts:
        completion, read = rollout.completion, list(rollout.prompt.student_ids)
        starts = [0, *(inserted.at for inserted in completion.inserted)]
        ends = [*starts[1:], len(completion.token_ids)]
        added = [(), *(inserted.ids for inserted in completion.inserted)]
        for start, end, ids in zip(starts, ends, added, strict=True):
            read += ids
            tokens = completion.token_ids[start:end]
            turns[tuple(read), tokens, completion.logprobs[start:end]] += 1
            read += tokens
    return turns


@pytest.mark.parametrize(("strip", "count"), [("system", 32), ("context", 4)])
def test_programs_train_what_the_engine_sampled(
    configured: Any, tmp_path: Path, strip: str, count: int
) -> None:
    flags = agent(tmp_path, *questions(count, turns=2), strip=strip)
    context = ("--orchestrator.teacher_model.context", SECRET)
    stage = configured(*flags, *context, "--orchestrator.batch_size", str(count),
        "--orchestrator.rollouts_per_example", "1")  # fmt: skip
    rollouts, metrics = stage.collect()
    assert [len(requests) for requests, _, _ in stage.engine.calls] == [count, count]
    assert trained(rollouts) == sampled(stage)
    assert metrics["turns/mean"] == 2
    assert metrics["env/errors"] == metrics["turns/unread"] == metrics["turns/unstripped"] == 0
    for rollout in rollouts:
        prompt = rollout.prompt
        texts = [
            stage.lab.builder.tokenizer.decode([*ids, *rollout.completion.sequence])
            for ids in (prompt.student_ids, prompt.teacher_ids)
        ]
        assert [text.count(SECRET) for text in texts] == [0, 1]
        assert prompt.teacher_text.count(SECRET) == 1
        assert "<|system|>" not in prompt.student_text


def test_choices_and_retries_are_samples_of_their_own(configured: Any, tmp_path: Path) -> None:
    flags = agent(tmp_path, *questions(2, n=3, turns=2))
    stage = configured(*flags, "--orchestrator.batch_size", "8")
    rollouts, metrics = stage.collect()
    assert trained(rollouts) == sampled(stage)
    assert metrics["turns/mean"] == 4
    # the second request goes on with the first choice, unless the others have the same text
    assert metrics["turns/restarts"] == 2
    assert {rollout.part for rollout in rollouts} == {0, 1, 2}


def test_a_step_is_the_same_again(configured: Any, tmp_path: Path) -> None:
    stage = configured(*agent(tmp_path, *questions(2, turns=2)))
    rollouts, _ = stage.collect(2)
    assert stage.collect(2)[0] == rollouts
    assert stage.collect(3)[0] != rollouts


def test_failures_are_counted_by_their_kind(configured: Any, tmp_path: Path) -> None:
    rows = [*questions(6), *questions(1, do="crash"), *questions(1, do="insist")]
    rows = [{**row, "number": i} for i, row in enumerate(rows)]
    flags = agent(tmp_path, *rows, max_requests=2)
    lasting = ("--orchestrator.max_env_error_frac", "0.5", "--orchestrator.batch_size", "8",
        "--orchestrator.rollouts_per_example", "1")  # fmt: skip
    rollouts, metrics = configured(*flags, *lasting).collect()
    assert len(rollouts) == 6
    assert metrics["env/errors"] == 2
    assert metrics["env/errors/crashed"] == metrics["env/errors/requests"] == 1


def test_requests_that_cannot_be_answered_are_refused_and_the_program_goes_on(
    configured: Any, tmp_path: Path
) -> None:
    """They are collected here as with `schedule = "async"`."""
    stage = configured(*agent(tmp_path, *questions(2, do="refused")))
    ahead = AsyncCollector(stage.collector, stage.engine)
    rollouts, metrics = ahead.take(1, 0)
    ahead.close()
    assert len(rollouts) == 8
    assert metrics["env/errors"] == 0
    assert trained(rollouts) == sampled(stage)


def test_a_run_whose_requests_have_no_context_ends(configured: Any, tmp_path: Path) -> None:
    flags = agent(tmp_path, *questions(8), strip="context")
    with pytest.raises(UserError, match="nothing to distill") as stopped:
        configured(*flags, "--orchestrator.teacher_model.context", "Not there.").collect()
    assert stopped.value.exit_code == EXIT_HEALTH


def test_evaluations_read_requests_as_they_came_or_stripped(
    configured: Any, tmp_path: Path
) -> None:
    stage = configured(*agent(tmp_path, *questions(8)))
    evaluator = stage.evaluator()
    seen = []
    for role, context in ((Role.STUDENT, False), (Role.TEACHER, True)):
        stage.engine.calls.clear()
        scores = evaluator.run("student", role, context=context)
        assert len(scores.rewards["agent"]) == 1
        [(requests, _, used)] = stage.engine.calls
        assert used is role
        seen.append(stage.lab.builder.tokenizer.decode(requests[0].prompt_ids))
    assert [SECRET in text for text in seen] == [False, True]
    [answer] = evaluator.student_answers()
    [(prompt, completion)] = answer.samples
    assert answer.text
    assert SECRET in prompt.teacher_text
    assert completion.token_ids


@pytest.fixture
def configured(configure: Configure) -> Iterator[Any]:
    stages: list[Stage] = []

    def make(*flags: str) -> Stage:
        stages.append(Stage(configure(*flags)))
        return stages[-1]

    yield make
    for stage in stages:
        close_environments(stage.environments.values())
