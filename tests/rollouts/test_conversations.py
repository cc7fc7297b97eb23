"""Conversations with an engine: what is trained on, and what the two roles read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from support.conversations import ECHO, MULTI, Recording, conversation_ids
from support.lab import Lab
from support.objective_reference import objective
from support.plain_forward import completion_logits

from minidistill.tasks.rewards import with_advantages
from minidistill.types import Completion, Inserted, Prompt, Reward, Role, Rollout, Task

Configure = Callable[..., Any]


def test_trained_tokens_are_those_sampled_and_those_inserted(staged: Any) -> None:
    stage = staged(*MULTI)
    rollouts, metrics = stage.collect()
    assert len(rollouts) == 8
    assert len(stage.engine.calls) == 3
    assert metrics["turns/restarts"] == 0
    assert 1 < metrics["turns/mean"] <= 3
    assert metrics["env/errors"] == 0
    turns = [
        (request, completion)
        for requests, completions, role in stage.engine.calls
        for request, completion in zip(requests, completions, strict=True)
    ]
    assert len({request.seed for request, _ in turns}) == len(turns)
    used = 0
    for rollout in rollouts:
        whole = conversation_ids(rollout)
        own = [
            (request.prompt_ids, completion)
            for request, completion in turns
            if [*request.prompt_ids, *completion.token_ids]
            == whole[: len(request.prompt_ids) + len(completion.token_ids)]
            and completion.logprobs[0] in rollout.completion.logprobs
        ]
        assert tuple(t for _, c in own for t in c.token_ids) == rollout.completion.token_ids
        assert tuple(p for _, c in own for p in c.logprobs) == rollout.completion.logprobs
        assert len(own) == 1 + len(rollout.completion.inserted)
        for (prompt, completion), inserted in zip(own, rollout.completion.inserted, strict=False):
            after = len(prompt) + len(completion.token_ids)
            assert tuple(whole[after : after + len(inserted.ids)]) == inserted.ids
        used += len(own)
    assert used == len(turns)
    assert any(len(r.completion.inserted) == 2 for r in rollouts)


def test_the_same_step_is_the_same_conversations(staged: Any) -> None:
    stage, again = staged(*MULTI), staged(*MULTI)
    assert stage.collect()[0] == again.collect()[0]
    assert stage.collect(2)[0] != again.collect(1)[0]


def plain_loss(rollouts: Sequence[Rollout], lab: Lab) -> torch.Tensor:
    """One rollout at a time, with transformers' logits, of the sampled tokens only."""
    loss, total = torch.zeros(()), sum(len(r.completion.token_ids) for r in rollouts)
    for rollout in rollouts:
        prompt, whole = rollout.prompt, conversation_ids(rollout)
        after = whole[len(prompt.student_ids) :]
        inserted: set[int] = set()
        shift = 0
        for each in rollout.completion.inserted:
            inserted |= set(range(each.at + shift, each.at + shift + len(each.ids)))
            shift += len(each.ids)
        rows = [i for i in range(len(after)) if i not in inserted]
        model = lab.policy.model
        with torch.no_grad(), model.disable_adapter():
            teacher_NV = completion_logits(model, prompt.teacher_ids, after)[rows]
        student_NV = completion_logits(model, prompt.student_ids, after)[rows]
        count = len(rows)
        result = objective(
            student_NV,
            teacher_NV,
            torch.tensor(rollout.completion.token_ids),
            advantage_N=torch.full((count,), rollout.advantage),
            sampler_logp_N=torch.tensor(rollout.completion.logprobs),
            estimator="full",
        )
        loss = loss + result.loss.sum() / total
    return loss


@pytest.mark.parametrize(
    "flags", [(), ("--trainer.packing",), ("--model.attn", "varlen")], ids=" ".join
)
def test_the_gradient_leaves_out_what_was_inserted(staged: Any, flags: tuple[str, ...]) -> None:
    stage = staged(*MULTI, *flags, "--trainer.loss.kl_clip", "off")
    lab = stage.lab
    lab.rollouts = stage.collect()[0]
    assert any(r.completion.inserted for r in lab.rollouts)
    loss = plain_loss(lab.rollouts, lab)
    parameters = dict(lab.policy.parameters)
    expected = torch.autograd.grad(loss, list(parameters.values()))
    gradients = lab.gradients()
    scale = max(float(g.abs().max()) for g in expected)
    assert scale > 1e-3
    for name, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(
            gradients[name], gradient, rtol=2e-3, atol=1e-5 * max(scale, 1.0)
        )
    result = lab.trainer.step(lab.rollouts, 1, lambda count: None)
    assert result.metrics["loss/total"] == pytest.approx(float(loss.detach()), rel=1e-4, abs=1e-6)
    assert result.metrics["kl/sampler_mismatch"] < 1e-8, "the positions are those of the sampler"
    for rollout, figures in zip(result.rollouts, result.tokens, strict=True):
        assert len(figures.kl) == len(rollout.completion.token_ids)


def test_an_engine_scores_the_sampled_tokens_of_the_same_sequence(staged: Any) -> None:
    stage = staged(*MULTI)
    teacher = replace(stage.placement.teacher, scorer="engine")
    stage.collector = stage.collecting(teacher=teacher)
    scored, _ = stage.collect()
    result = stage.lab.trainer.step(
        [replace(r, teacher=None) for r in scored], 1, lambda count: None
    )
    for rollout, figures in zip(scored, result.tokens, strict=True):
        assert rollout.teacher is not None
        assert [*rollout.teacher.logprobs] == pytest.approx(figures.teacher_logp.tolist(), abs=1e-4)


def test_likeliest_ids_are_scored_at_the_sampled_tokens_alone(staged: Any) -> None:
    stage = staged("--trainer.loss.estimator", "top_k", "--trainer.loss.top_k", "2")
    teacher = replace(stage.placement.teacher, scorer="engine")
    collector = stage.collecting(teacher=teacher)
    asked: list[Any] = []

    class Scoring(Recording):
        def score_ids(self, prompts: Any, sequences: Any, ids: Any, role: Role) -> Any:
            asked.extend([prompts, sequences, ids, role])
            return [-rows.astype(np.float32) for rows in ids]

    completion = Completion(
        (1, 2, 3),
        (-1.0,) * 3,
        "eos",
        top_ids=np.array([[11, 12], [21, 22], [31, 32]]),
        inserted=(Inserted(1, (7, 8)),),
    )
    prompt = stage.lab.rollouts[0].prompt
    engine: Any = Scoring(stage.lab.engine)
    [rollout] = collector.score_with_teacher(engine, [Rollout(prompt, 0, completion, "")])
    assert asked[:2] == [[prompt.teacher_ids], [(1, 7, 8, 2, 3)]]
    assert asked[2][0].tolist() == [[1, 11, 12], [7, 7, 7], [8, 8, 8], [2, 21, 22], [3, 31, 32]]
    assert rollout.teacher is not None
    assert rollout.teacher.logprobs == [-1, -2, -3]
    assert rollout.teacher.top is not None
    assert rollout.teacher.top.tolist() == [[-11, -12], [-21, -22], [-31, -32]]


def test_the_teacher_reads_the_context_once_and_the_student_never(staged: Any) -> None:
    stage = staged(*ECHO)
    rollouts, _ = stage.collect()
    context = stage.loaded.config.orchestrator.teacher_model.context.strip()

    def times(ids: Sequence[int]) -> int:
        return str(stage.lab.builder.tokenizer.decode(list(ids))).count(context)

    for rollout in rollouts:
        whole = conversation_ids(rollout)
        assert times(whole) == 0
        assert times([*rollout.prompt.teacher_ids, *rollout.completion.sequence]) == 1
    for role, context_added, expected in (
        (Role.STUDENT, False, 0), (Role.TEACHER, True, 1), (Role.STUDENT, True, 1),
    ):  # fmt: skip
        stage.engine.calls.clear()
        stage.evaluator().run("x", role, context=context_added)
        assert len(stage.engine.calls) == 2
        for requests, _, asked in stage.engine.calls:
            assert asked is role
            assert {times(r.prompt_ids) for r in requests} == {expected}


def test_versions_are_those_of_each_turn(staged: Any) -> None:
    """New weights arrived in the middle of the first turn, and between it and the second."""
    stage = staged(*ECHO)
    generate = stage.engine.generate

    def versioned(*arguments: Any) -> list[Completion]:
        first = not stage.engine.calls
        completions = generate(*arguments)
        return [
            replace(c, versions=((0, 1), (len(c.token_ids) - 1, 2)) if first else ((0, 3),))
            for c in completions
        ]

    stage.engine.generate = versioned
    for rollout in stage.collect()[0]:
        at = rollout.completion.inserted[0].at
        left = len(rollout.completion.token_ids) - at
        expected = [1] * (at - 1) + [2] + [3] * left
        assert rollout.completion.token_versions(0) == expected


def test_each_sample_of_a_conversation_has_its_advantage_and_counts_once() -> None:
    prompt, later = (Prompt("env", Task(id, ()), "", "", (1, 2), (1, 2)) for id in ("t", "t"))
    end = Completion((3,), (-1.0,), "eos")

    def sample(number: int, value: float, part: int = 0) -> Rollout:
        of = later if part else prompt
        return Rollout(of, number, end, "", Reward(value), part=part, first=prompt)

    group = [sample(0, 1.0), sample(0, 1.0, 1), sample(0, 1.0, 2), sample(1, 0.0)]
    assert [r.advantage for r in with_advantages(group, False)] == [0.5, 0.5, 0.5, -0.5]
    assert [r.advantage for r in with_advantages(group, True)] == [1, 1, 1, -1]


def test_the_sequence_of_a_completion() -> None:
    completion = Completion(
        (1, 2, 3, 4), (0.0,) * 4, "eos", inserted=(Inserted(1, (7, 8)), Inserted(3, (9,)))
    )
    assert completion.sequence == (1, 7, 8, 2, 3, 9, 4)
    assert completion.sampled_at == (0, 3, 4, 6)


def test_a_template_that_forgets_makes_a_sample_of_each_turn(
    staged: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    template = (
        "{% for m in messages %}<|{{ m['role'] }}|>{{ loop.length }}{{ m['content'] }}<|end|>"
        "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    stage = staged(*ECHO)
    tokenizer = stage.lab.builder.tokenizer
    tokenizer.chat_template = template
    rollouts, metrics = stage.collect()
    assert metrics["turns/restarts"] == 1
    assert [(r.sample, r.part) for r in rollouts] == [
        (sample, part) for _ in range(2) for sample in range(4) for part in range(2)
    ]
    assert not any(r.completion.inserted for r in rollouts)
    for first, second in zip(rollouts[::2], rollouts[1::2], strict=True):
        assert first.advantage == second.advantage
        assert first.reward is second.reward
        assert second.prompt.student_text.startswith("<|user|>3Solve this puzzle.")
        assert first.text in second.prompt.student_text
        assert "world-class" not in second.prompt.student_text
        assert second.prompt.teacher_text.count("world-class") == 1
    stage.lab.rollouts = rollouts
    result = stage.lab.trainer.step(rollouts, 1, lambda count: None)
    values = [r.reward.value for r in rollouts[::2]]
    assert result.metrics["reward/mean"] == pytest.approx(sum(values) / len(values))
